"""Short and frequent English words for generated problems, which tokenizers of small models know too."""

ADJECTIVES = tuple(
    """
    able amber ancient angry basic bitter blank blind blue bold brave brief bright broad broken brown busy calm
    careful cheap cheerful clean
    clear clever cloudy cold common cool crazy crisp cruel curious curly cute damp dark deep dirty double dry dull
    dusty eager early easy
    empty equal even fair false famous fancy fast final fine firm flat foreign formal fragile free frequent fresh
    friendly frozen full funny
    gentle giant glad golden grand gray great green happy hard heavy hidden hollow honest huge humble hungry icy idle
    jolly joint kind large
    late lazy lean little lively local lonely long loose loud lovely lucky mad main major mild minor modern modest
    muddy narrow natural neat
    nervous new nice noble noisy normal odd old open orange pale patient perfect pink plain polite poor pretty prime
    private proud pure
    purple quick quiet random rapid rare raw ready red regular rich rough round royal rude sad safe salty secret sharp
    shiny short shy
    silent silly silver simple sleepy slow small smart smooth soft solid sour special steady steep stiff strange
    strict strong sudden sunny
    sweet tall tame thick thin tidy tight tiny tired tough true ugly urban useful vague vast violet warm weak wet
    white whole wide wild
    windy wise wooden yellow young
    """.split()  # noqa: SIM905  # a list of so many strings would be unreadable
)

NOUNS = tuple(
    """
    actor animal apple army arrow artist baker balloon banana basket battle beach bear bell bird blanket boat book
    bottle bottom box branch
    bread bridge brother brush bucket button cabin cable camel camera camp candle captain carpet castle cattle chain
    chair chicken circle
    citizen city clock cloud coat coffee coin college corner cotton cousin cow cream crowd crown cup curtain dancer
    daughter desert desk
    diamond dinner doctor dog donkey door dragon dream dress driver duck eagle ear egg elephant engine evening face
    factory family farm
    farmer father feather fence finger fire fish flag floor flower forest fox friend frog fruit game garden gate ghost
    giraffe glass glove
    goat gold grass guest guitar hammer hand harbor hat hill horse hospital hotel house hunter island jacket mark
    juice kettle key king
    kitchen knife ladder lake lamp lawyer leaf lemon letter library lion lock lunch machine map market meadow melon
    mirror monkey moon
    morning mother mountain mouse museum music nail needle nest nose nurse ocean office onion owl page paint palace
    paper parent park party
    pencil pepper piano picture pig pilot pipe planet plate pocket poem poet pond potato prince queen rabbit rain
    ribbon rice ring river
    road robot rock roof rope rose sailor salt sand school sea shadow sheep ship shirt shoe shop silk singer sister
    snake snow sock soldier
    song soup spider spoon star station stone storm story street student sugar summer sun table teacher tent tiger
    tower town train tree
    truck turtle uncle valley village violin wagon wall water wheel whale window winter wolf wood writer
    """.split()  # noqa: SIM905  # a list of so many strings would be unreadable
)
