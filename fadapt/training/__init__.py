"""fit and sweep: training of one adapter or of many in one folded pass."""

from .data import Order as Order
from .directory import Checkpoints as Checkpoints
from .grid import grid as grid
from .param_groups import param_groups as param_groups
from .rank_budget import RankBudget as RankBudget
from .report import Goal as Goal
from .report import Report as Report
from .report import Result as Result
from .settings import Options as Options
from .settings import Settings as Settings
from .sweep import fit as fit
from .sweep import sweep as sweep
from .trial import Halving as Halving
from .trial import Schedule as Schedule
from .trial import Trial as Trial
