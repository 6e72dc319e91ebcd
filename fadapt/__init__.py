"""fadapt: small adapters as pure functions over an explicit params pytree."""

from .config import Config as Config
from .describe import summary as summary
from .errors import CalibrationError as CalibrationError
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DenseFallbackWarning as DenseFallbackWarning
from .errors import FadaptError as FadaptError
from .errors import FadaptWarning as FadaptWarning
from .errors import TargetError as TargetError
from .initialise import init as init
from .io import load as load
from .io import save as save
from .merge import merge as merge
from .method import Method as Method
from .methods import IA3 as IA3
from .methods import IA3FF as IA3FF
from .methods import SSVD as SSVD
from .methods import AntiPaSTO as AntiPaSTO
from .methods import AntiPaSTOAblate as AntiPaSTOAblate
from .methods import AntiPaSTOArrow as AntiPaSTOArrow
from .methods import AntiPaSTODPLR as AntiPaSTODPLR
from .methods import AntiPaSTORotation as AntiPaSTORotation
from .methods import Chain as Chain
from .methods import DoRA as DoRA
from .methods import LoRA as LoRA
from .methods import RsLoRA as RsLoRA
from .run import apply as apply
from .run import bound as bound
from .run import run as run
from .stack import Stack as Stack
from .stack import select as select
from .stack import stack as stack
from .stack import unstack as unstack
from .tree import Adapter as Adapter
from .tree import Params as Params
from .tree import join as join
from .tree import project as project
from .tree import scale as scale
from .tree import split as split
from .tree import trainable as trainable

__version__ = "0.1.0"
