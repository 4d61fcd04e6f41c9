"""The project ``helios``: joint fine-tuning of the Helios (OlmoEarth) encoder.

The table maps a workflow's name to ``module:function``; a module is imported only when its workflow is asked for.
"""

workflows = {
    "make_example": "rslp.helios.make_example:make_example",
    "make_multidataset_config": "rslp.helios.make_multidataset_config:make_multidataset_config",
    "check": "rslp.helios.check:check",
    "launch_finetune": "rslp.helios.launch_finetune:launch_finetune",
    "jobs": "rslp.helios.jobs:jobs",
    "logs": "rslp.helios.logs:logs",
    "cancel": "rslp.helios.cancel:cancel",
    "pack": "rslp.helios.pack:pack",
    "run": "rslp.helios.run:run",
    "run_ranks": "rslp.helios.run_ranks:run_ranks",
    "run_slurm": "rslp.helios.run_slurm:run_slurm",
}
