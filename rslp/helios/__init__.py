"""The project ``helios``: joint fine-tuning of the Helios (OlmoEarth) encoder.

``workflows`` maps the name of a workflow on the command line to ``module:function``; the command line imports a module
only when its workflow is called.
"""

workflows = {
    "make_example": "rslp.cli.make_example:make_example",
    "make_dataset": "rslp.cli.make_dataset:make_dataset",
    "make_multidataset_config": "rslp.cli.make_multidataset_config:make_multidataset_config",
    "check": "rslp.cli.check:check",
    "launch_finetune": "rslp.cli.launch_finetune:launch_finetune",
    "jobs": "rslp.cli.jobs:jobs",
    "logs": "rslp.cli.jobs:logs",
    "cancel": "rslp.cli.jobs:cancel",
    "compare": "rslp.cli.results:compare",
    "pack": "rslp.cli.pack:pack",
    "merge_adapters": "rslp.cli.merge_adapters:merge_adapters",
    "study": "rslp.cli.study:study",
    "report": "rslp.cli.results:report",
    "run": "rslp.cli.run:run",
    "run_ranks": "rslp.cli.run:run_ranks",
    "run_slurm": "rslp.cli.run:run_slurm",
    "run_baseline": "rslp.cli.study:run_baseline",
}
