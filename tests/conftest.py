"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CXX"] = "false"  # nothing is compiled at run time: see distributed.init_deepspeed

import pytest

from tests import forks

if forks.FOLDER not in os.environ:  # not in the processes of pytest-xdist, which inherit it
    FORKS = forks.open_server()

if TYPE_CHECKING:
    from tests.border_world import BorderWorld
    from tests.ppo_world import World

TEXT = """
### User
Which of the planets has rings, and why do they not fall down? Please explain it in two or three sentences.

### Dromedary
Saturn has the brightest rings; Jupiter, Uranus and Neptune have faint ones. They are made of ice and dust, and
every piece of them is in orbit around its planet, so that it falls all the time and yet never comes down.

You are to select the preferred (least wrong) output for the instruction: Output (a) or Output (b).
# Heading
## List
- one, two, three
1. "a" or "b"?  «Größe», naïve, 東京, 日本語, 🙂
The more honest, concise, creative, helpful, methodical, specific and comprehensive output is Output (
"""


# Files that take longest start first, so that no process is left alone with one at the end. While the first builds the
# small run, the next ones do not need it.
FIRST = ("pipeline", "models", "anywhere", "tasks", "fuzz", "workflow", "verification", "cost", "train_policy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; pytest-xdist's `--no-loadscope-reorder` keeps the order."""
    places = {f"test_{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with random weights (about 0.1M parameters) and a byte-level BPE tokenizer, as on the hub."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def save_tiny_model(folder: Path, width: int = 64) -> Path:
    """A Llama with random weights and 4 heads.

    The tokenizer puts `<s>` in front and has no padding token, like Llama's.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # so that the next token depends on what came before
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> "World":
    """What PPO reads, made from the tiny model; tests that change it take a copy."""
    from tests.ppo_world import World

    found = World(tmp_path_factory.mktemp("world"), tiny_model)
    found.build()
    return found


@pytest.fixture(scope="session")
def policy(world: "World") -> Path:
    """What an undisturbed run of PPO writes."""
    from tests.ppo_world import run

    output = world.folder / "undisturbed" / "policy"
    status, log = run(world.arguments(output))
    assert status == 0, log
    return output


Share = Callable[[str, Callable[[Path], None]], Path]  # name of the folder, and what builds it


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Share:
    """Build a folder that the processes of pytest-xdist share: the first that needs it builds it, the others wait."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()

    def share(name: str, build: Callable[[Path], None]) -> Path:
        folder = (base if worker_id == "master" else base.parent) / name
        built = folder.with_suffix(".built")
        with FileLock(folder.with_suffix(".lock")):
            if not built.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a failed build in another process
                folder.mkdir()
                build(folder)
                built.touch()
        return folder

    return share


@pytest.fixture(scope="session")
def border_world(shared: Share) -> "BorderWorld":
    """Inputs and artifacts of all scripts; tests that change them take a copy."""
    from tests.border_world import BorderWorld

    return BorderWorld(shared("border", lambda folder: BorderWorld(folder).build()))


@pytest.fixture(scope="session")
def small_run(shared: Share) -> Path:
    """Folder of a small run of the whole DAG: config.yaml and results; tests that change something take a copy."""
    from tests.small_run import build

    return shared("pipeline", build)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the zoo's Llama, which tests copy before they change it."""
    from tests import zoo

    folder = tmp_path_factory.mktemp("llama")
    zoo.build("llama", folder)
    return folder


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LoRA adapter on `llama`."""
    from tests.damaged_models import make_adapter

    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(llama, folder)
    return folder
