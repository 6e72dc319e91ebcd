"""The adapter methods, one file each; a module's docstring is the method's card."""

from .antipasto import AntiPaSTO as AntiPaSTO
from .antipasto_ablate import AntiPaSTOAblate as AntiPaSTOAblate
from .antipasto_arrow import AntiPaSTOArrow as AntiPaSTOArrow
from .antipasto_asvd import AntiPaSTOASVD as AntiPaSTOASVD
from .antipasto_corda import AntiPaSTOCorDA as AntiPaSTOCorDA
from .antipasto_dplr import AntiPaSTODPLR as AntiPaSTODPLR
from .antipasto_rotation import AntiPaSTORotation as AntiPaSTORotation
from .bitfit import BitFit as BitFit
from .chain import Chain as Chain
from .corda import CorDA as CorDA
from .delora import DeLoRA as DeLoRA
from .dora import DoRA as DoRA
from .eva import EVA as EVA
from .hra import HRA as HRA
from .ia3 import IA3 as IA3
from .ia3 import IA3FF as IA3FF
from .lora import LoRA as LoRA
from .lora import RsLoRA as RsLoRA
from .oft import OFT as OFT
from .pissa import PiSSA as PiSSA
from .road import RoAd as RoAd
from .ssteer import SSteer as SSteer
from .ssvd import SSVD as SSVD
from .sum import Sum as Sum
