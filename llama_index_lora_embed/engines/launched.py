"""A process that `ProcessLauncher` started: `torchrun ... -m llama_index_lora_embed.engines.launched FOLDER`."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from llama_index_lora_embed.core.errors import LoraEmbedError
from llama_index_lora_embed.core.files import whole_file
from llama_index_lora_embed.engines.launcher import ERROR, ORDER, RESULT, Order, with_settings


def main() -> None:
    """Train what the folder's file says; leave the result, or the error, beside it."""
    from llama_index_lora_embed.training import distributed

    folder = Path(sys.argv[1])
    if list(folder.glob(f"{ERROR}-*")):  # of an earlier try; it would come again
        return
    order: Order = pickle.loads((folder / ORDER).read_bytes())
    run = order.run
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        run = with_settings(run, output={"resume_from_checkpoint": True})
    try:
        result = run.execute(order.callbacks, order.train_kwargs, warn=False)
    except LoraEmbedError as error:
        with whole_file(folder / f"{ERROR}-{distributed.rank()}", "wb") as file:
            pickle.dump(error, file)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if distributed.is_main():
        with whole_file(folder / RESULT, "wb") as file:
            pickle.dump(result, file)


if __name__ == "__main__":
    main()
