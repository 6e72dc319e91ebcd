"""PEFT's format: reading, writing, and the form that servers take.

    params = fadapt.peft.load_peft("their/adapter", model)
    fadapt.peft.save_peft(model, params, "my/adapter")
    fadapt.peft.save_peft(model, params, "served", serving=True)
    config, tensors = fadapt.peft.peft_dict(model, params, serving=True)
    fadapt.peft.served_by(config, tensors)

PEFT itself is not needed. What its format cannot hold is refused with the reason, and what a file
says that fadapt cannot hold likewise: nothing is left out in silence.

Another method is one more file in ``formats`` and one line in its table. The file holds a
:class:`~fadapt.peft.format.Format`:

- ``peft_type``, ``methods`` (the classes it writes), ``suffixes`` (the tensors of a module) and
  ``layers`` (what PEFT applies it to);
- ``fields`` of the config that it reads, ``refused`` ones with the reason, ``patterns``;
- ``read(settings, place, tensors)``: the method and leaves of one place. ``settings`` and
  ``tensors.take(suffix, *shape)`` check what they give, so there is nothing else to check;
- ``settings(adapters)``: the config fields that hold for a whole file, or an error where the
  adapters do not agree on one; and ``write(place, adapter, settings)``: the tensors of one place;
- ``shared``, ``read_shared`` and ``write_shared`` where tensors belong to the file and no module.

Names, targets, biases, files and errors are the same for all formats and are done around it. A row
in ``tests/peft_table.py`` tests it against PEFT in both directions.
"""

from .files import adapters_in as adapters_in
from .load import from_peft_dict as from_peft_dict
from .load import load_peft as load_peft
from .save import peft_dict as peft_dict
from .save import save_peft as save_peft
from .serving import Verdict as Verdict
from .serving import served_by as served_by
