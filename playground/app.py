"""The playground: ask policies, and see what reward models and the judge make of the answers under any principles.

    python playground/app.py --results results/demo

It reads a folder of results, loads one base model with all adapters of the folder, and serves one page on this machine.
Nothing leaves the machine, and the page needs no network.
"""

import logging
import os
import sys
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT / "workflow_scripts"), str(CHECKOUT)]

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from pydantic import Field  # noqa: E402

from playground import page, results, tables  # noqa: E402
from playground.workbench import Workbench  # noqa: E402
from salmon import script  # noqa: E402
from salmon.border import reason  # noqa: E402
from salmon.errors import UserError  # noqa: E402

log = logging.getLogger("salmon.playground")


class Arguments(script.Arguments):
    """Serve the playground for a folder of results."""

    results: Path = Field(Path("results/demo"), description="folder of results")
    principles: Path | None = Field(
        None, description="JSON list of dimension, definition, negative_definition; without it, those of the judge"
    )
    port: int = Field(7860, ge=1, le=65535, description="of the page")
    host: str = Field(
        "127.0.0.1", description="address to listen on; with another one, other machines can use the page"
    )
    device: str = Field("auto", description="`cpu`, `cuda`, or `auto`: a GPU if there is one")


def main(arguments: Arguments) -> None:
    """Read the results, load the models, serve the page until it is stopped."""
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = results.read(arguments.results, arguments.principles)
    for sentence in found.left_out:
        log.warning("%s", sentence)
    blocks = page.build(Workbench(found, torch.device(name)))
    serve(blocks, arguments.host, arguments.port)


def serve(blocks: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=tables.CSS,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({reason(error)}): name another port with --port") from None
    log.info("open http://%s:%d in a browser; Ctrl-C stops the playground", host, port)
    blocks.block_thread()


if __name__ == "__main__":
    script.run(main, Arguments)
