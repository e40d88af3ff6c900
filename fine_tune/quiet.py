"""What libraries say about themselves is kept off the terminal; their errors and our own lines stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence them for this process."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # torch says of selective recomputation what its documentation says.
    talkers = ("lightning.pytorch", "lightning.fabric", "bitsandbytes", "torch.distributed", "torch._higher_order_ops.wrap")
    for name in talkers:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|bitsandbytes|peft|transformers|torch)\b")
