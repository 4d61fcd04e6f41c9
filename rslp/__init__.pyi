"""The types of the names that ``__init__.py`` imports on first use."""

from rslp.api import check as check
from rslp.api import evaluate as evaluate
from rslp.api import fit as fit
from rslp.api import plan as plan
from rslp.api import predict as predict
from rslp.api import report as report
from rslp.api import study as study
from rslp.api import submit as submit
from rslp.check.findings import CheckOptions as CheckOptions
from rslp.config.sources import compose_file
from rslp.errors import UserError as UserError
from rslp.launch.job import Job as Job
from rslp.rundir import RunDir as RunDir

__version__: str
compose = compose_file
