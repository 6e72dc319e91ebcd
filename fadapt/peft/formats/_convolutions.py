"""What PEFT's own layers for convolutions do not know."""

from __future__ import annotations

from ...errors import CheckpointError
from ..format import Format
from ..places import Place


def refuse_three_axes(form: Format, place: Place) -> None:
    """Refuses a kernel of three axes, for formats that know one and two."""
    if len(place.site.kernel) > 3:
        raise CheckpointError(
            f"{place.site.name}: PEFT's {form.peft_type} knows no convolution over three axes; "
            "save fadapt.as_lora(model, params, r=...)"
        )
