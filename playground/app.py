"""The playground: ask policies, and see what reward models and the judge make of the answers under any principles.

    python playground/app.py --results results/demo

It reads a folder of results, loads one base model with all adapters of the folder, and serves one page on this machine.
Nothing leaves the machine, and the page needs no network.
"""

import logging
import os
import socket
import sys
from pathlib import Path

# Before gradio is imported: no analytics, and gradio asks its own server whether it runs, which is behind no proxy.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
for variable in ("no_proxy", "NO_PROXY"):
    os.environ[variable] = ",".join(filter(None, (os.environ.get(variable), "127.0.0.1,localhost,::1")))
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
    run: str | None = Field(None, description="run whose base model is used; by default the base of most runs")
    port: int = Field(7860, ge=1, le=65535, description="of the page")
    host: str = Field(
        "127.0.0.1", description="address to listen on; anything but this machine's own is open to others"
    )
    device: str = Field("auto", description="`cpu`, `cuda`, or `auto`: a GPU if there is one")


def main(arguments: Arguments) -> None:
    """Read the results, load the models, serve the page until it is stopped."""
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_address(arguments.host, arguments.port)
    found = results.read(arguments.results, arguments.principles, arguments.run)
    for sentence in found.notes:
        log.warning("%s", sentence)
    try:
        bench = Workbench(found, torch.device(name))
        serve(page.build(bench), arguments.host, arguments.port)
        bench.close()
    except KeyboardInterrupt:
        log.info("stopped")


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be used, before any model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({reason(error)}): name another port with --port") from None


def serve(blocks: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until Ctrl-C."""
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
        run_history=False,  # it would keep what was asked in the browser, and offer to send it to the hub
        ssr_mode=False,
    )
    log.info("open http://%s:%d in a browser; Ctrl-C ends it", host, port)
    blocks.block_thread()


if __name__ == "__main__":
    script.run(main, Arguments)
