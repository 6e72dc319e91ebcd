"""fadapt: small adapters as pure functions over an explicit params pytree.

Example:
    The examples of the public names begin with these.

    >>> import torch, fadapt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    >>> x, labels = torch.randn(6, 8), torch.randint(4, (6,))
    >>> loss_fn = lambda output, batch: nn.functional.cross_entropy(output, labels)
"""

from . import peft as peft
from .as_lora import TruncatedLoRA as TruncatedLoRA
from .as_lora import as_lora as as_lora
from .calibration import Stats as Stats
from .calibration import observe as observe
from .calibration import wanda_scores as wanda_scores
from .combine import combine as combine
from .config import Config as Config
from .errors import CalibrationError as CalibrationError
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DenseFallbackWarning as DenseFallbackWarning
from .errors import FadaptError as FadaptError
from .errors import FadaptWarning as FadaptWarning
from .errors import OneByOneWarning as OneByOneWarning
from .errors import TargetError as TargetError
from .init import init as init
from .io.adapters import load as load
from .io.adapters import save as save
from .merge import merge as merge
from .merge_many import merge_many as merge_many
from .method import Leaves as Leaves
from .method import LinearMap as LinearMap
from .method import Method as Method
from .method import SiteView as SiteView
from .method import Statistic as Statistic
from .methods import BOFT as BOFT
from .methods import C3A as C3A
from .methods import EVA as EVA
from .methods import HRA as HRA
from .methods import IA3 as IA3
from .methods import IA3FF as IA3FF
from .methods import OFT as OFT
from .methods import PSOFT as PSOFT
from .methods import SSVD as SSVD
from .methods import AdaLoRA as AdaLoRA
from .methods import AntiPaSTO as AntiPaSTO
from .methods import AntiPaSTOAblate as AntiPaSTOAblate
from .methods import AntiPaSTOArrow as AntiPaSTOArrow
from .methods import AntiPaSTOASVD as AntiPaSTOASVD
from .methods import AntiPaSTOCorDA as AntiPaSTOCorDA
from .methods import AntiPaSTODPLR as AntiPaSTODPLR
from .methods import AntiPaSTORotation as AntiPaSTORotation
from .methods import BitFit as BitFit
from .methods import Chain as Chain
from .methods import CorDA as CorDA
from .methods import DeLoRA as DeLoRA
from .methods import DoRA as DoRA
from .methods import FourierFT as FourierFT
from .methods import Full as Full
from .methods import GraLoRA as GraLoRA
from .methods import HiRA as HiRA
from .methods import KaSA as KaSA
from .methods import LNTuning as LNTuning
from .methods import LoHa as LoHa
from .methods import LoKr as LoKr
from .methods import LoRA as LoRA
from .methods import LoRAGA as LoRAGA
from .methods import LoRAXS as LoRAXS
from .methods import MiCA as MiCA
from .methods import MiSS as MiSS
from .methods import OLoRA as OLoRA
from .methods import PiSSA as PiSSA
from .methods import RandLoRA as RandLoRA
from .methods import ReFT as ReFT
from .methods import RoAd as RoAd
from .methods import RsLoRA as RsLoRA
from .methods import SHiRA as SHiRA
from .methods import SSteer as SSteer
from .methods import Sum as Sum
from .methods import TinyLoRA as TinyLoRA
from .methods import TrainableTokens as TrainableTokens
from .methods import VeRA as VeRA
from .module import as_module as as_module
from .params.adapter import Adapter as Adapter
from .params.params import Params as Params
from .params.params import join as join
from .params.params import project as project
from .params.params import scale as scale
from .params.params import split as split
from .params.params import trainable as trainable
from .params.stack import Stack as Stack
from .params.stack import select as select
from .params.stack import stack as stack
from .params.stack import unstack as unstack
from .params.summary import summary as summary
from .run import apply as apply
from .run import bound as bound
from .run import run as run
from .training import Checkpoints as Checkpoints
from .training import Halving as Halving
from .training import RankBudget as RankBudget
from .training import Report as Report
from .training import Trial as Trial
from .training import fit as fit
from .training import grid as grid
from .training import param_groups as param_groups
from .training import sweep as sweep

__version__ = "0.1.0"
