"""The table of formats; another one is one more file and one more line here."""

from __future__ import annotations

from ...errors import CheckpointError
from ...params.adapter import Adapter
from ..format import Format
from .adalora import AdaLoRAFormat
from .boft import BOFTFormat
from .c3a import C3AFormat
from .delora import DeLoRAFormat
from .fourierft import FourierFTFormat
from .gralora import GraLoRAFormat
from .hira import HiRAFormat
from .hra import HRAFormat
from .ia3 import IA3Format
from .ln_tuning import LNTuningFormat
from .loha import LoHaFormat
from .lokr import LoKrFormat
from .lora import LoRAFormat
from .miss import MiSSFormat
from .oft import OFTFormat
from .psoft import PSOFTFormat
from .randlora import RandLoRAFormat
from .road import RoAdFormat
from .shira import SHiRAFormat
from .tiny_lora import TinyLoRAFormat
from .trainable_tokens import TrainableTokensFormat
from .vera import VeRAFormat

FORMATS: tuple[Format, ...] = (
    # Before LoRA, of which it is a subclass.
    AdaLoRAFormat(),
    LoRAFormat(),
    DeLoRAFormat(),
    IA3Format(),
    HRAFormat(),
    RoAdFormat(),
    OFTFormat(),
    BOFTFormat(),
    PSOFTFormat(),
    C3AFormat(),
    FourierFTFormat(),
    GraLoRAFormat(),
    HiRAFormat(),
    LNTuningFormat(),
    LoHaFormat(),
    LoKrFormat(),
    MiSSFormat(),
    TinyLoRAFormat(),
    TrainableTokensFormat(),
    SHiRAFormat(),
    VeRAFormat(),
    RandLoRAFormat(),
)


PROMPTS = (
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE ADAPTION_PROMPT"
)
NEVER = {
    **dict.fromkeys(PROMPTS.split(), "it adds tokens, or keys and values, and changes no weight"),
    "XLORA": "a gate mixes several LoRAs by what the model says in a pass before",
    "POLY": "a router mixes several LoRAs by the task",
    "SHADOW": "it runs another network beside the model",
}
"""What no increment of a weight is, by ``peft_type``, and why."""


def format_named(peft_type: object, where: str) -> Format:
    """The format of a file's ``peft_type``."""
    for one in FORMATS:
        if one.peft_type == peft_type:
            return one
    named = str(peft_type)[:80]
    why = f", and {NEVER[named]}" if named in NEVER else ""
    raise CheckpointError(
        f"{where}: peft_type is {named!r}{why}; fadapt reads "
        f"{', '.join(f.peft_type for f in FORMATS)}"
    )


def format_of(name: str, adapter: Adapter) -> Format:
    """The format that holds an adapter."""
    method = adapter.method
    for one in FORMATS:
        if one.writes(method):
            return one
    raise CheckpointError(
        f"{name}: PEFT has no format for {method!r}. Convert it first: "
        "save_peft(model, fadapt.as_lora(model, params), path), with r=... where its increment "
        "has full rank"
    )
