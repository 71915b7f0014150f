"""Will a retrofit fit on named hardware, and how long does a step take?

Begin with `step_plan`; `nearby_settings` looks for a setting that fits when the asked one does not.
"""
