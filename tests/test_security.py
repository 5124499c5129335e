"""What comes from elsewhere is read, never executed; the other promises are tested where they are
kept: data paths in `data/test_image_files` and `data/test_odd_inputs`, checkpoints in
`learner/test_state_files`, rewards' environment in `rewards/test_pool`, keys, addresses and tokens
in `cluster/test_real_run` and `cluster/test_publish`."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from medrl.actors.wire import open_store
from medrl.cluster.engines import model_at
from medrl.cluster.preflight import check_model
from medrl.configs.check import contradictions
from medrl.configs.errors import UserError
from medrl.configs.schema import Config, DataConfig, ModelConfig, RunConfig
from medrl.data.images import ImageStore
from medrl.learner.model import PromptReader, load_policy

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "bench", "cluster", "configs", "data", "learner", "reports", "rewards")
EXECUTES = re.compile(
    r"trust_remote_code=(?!trust\b|model\.runs_code\b)|weights_only=False"
    r"|torch\.load\((?!path, .*weights_only=True)"
    r"|pickle\.loads?\(|Unpickler|allow_pickle=True|yaml\.load\(|shell=True|\beval\(|\bexec\("
)


def test_no_code_here_executes_what_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if EXECUTES.search(line) and not re.search(r"\.eval\(|def eval\(", line)
    ]
    assert not found


def plant(model: Path, mark: Path, **changes: object) -> None:
    """Code of its own beside the weights, named in every file that may name some."""
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    for name in ("config", "processor_config", "tokenizer_config", "preprocessor_config"):
        path = model / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {
            "AutoTokenizer": ["evil.Evil", "evil.Evil"]
        }
        path.write_text(json.dumps(content | (changes if name == "config" else {})))


def test_code_in_a_model_folder_is_ignored(tmp_path: Path, tiny_model: Path) -> None:
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_model, model)
    (model / "preprocessor_config.json").unlink(missing_ok=True)
    plant(model, mark)
    (model / "preprocessor_config.json").unlink()
    check_model(str(model))
    load_policy(str(model), torch.float32, forbidden=())
    assert not mark.exists()


def test_a_model_that_needs_its_own_code_is_refused_whatever_the_user_types(
    tmp_path: Path, tiny_model: Path
) -> None:
    """transformers would ask on the terminal."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_model, model)
    plant(model, mark, model_type="evil")
    told = rf"set model\.trust_remote_code = {str(model)!r}"
    with pytest.raises(UserError, match=f"brings code of its own, and none .*; .* {told}"):
        check_model(str(model))
    script = f"from medrl.cluster.preflight import check_model; check_model({str(model)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], input="y\ny\ny\n", capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "[y/N]" not in done.stdout
    assert not mark.exists()


OWN = """
import transformers
class Qwen2VLConfig(transformers.Qwen2VLConfig): pass
class Qwen2VLForConditionalGeneration(transformers.Qwen2VLForConditionalGeneration):
    config_class = Qwen2VLConfig
class Qwen2VLProcessor(transformers.Qwen2VLProcessor): pass
"""


@pytest.mark.parametrize("trust", [True, False])
def test_a_models_own_code_runs_where_it_is_trusted_by_name_and_only_there(
    tmp_path: Path, tiny_model: Path, trust: bool
) -> None:
    """In all of preflight and learner: one that forgot it would load another class."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "own.py").write_text(OWN)
    for name, map in {
        "config": {
            "AutoConfig": "own.Qwen2VLConfig",
            "AutoModelForImageTextToText": "own.Qwen2VLForConditionalGeneration",
        },
        "processor_config": {"AutoProcessor": "own.Qwen2VLProcessor"},
    }.items():
        path = model / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | {"auto_map": map}))
    check_model(str(model), trust=trust)
    if trust:  # transformers renames what it reads for its own classes only
        own: Any = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True)
        tensors = {name: it for name, it in own.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})  # it is tied
    policy = load_policy(str(model), torch.float32, trust=trust)
    images = AutoImageProcessor.from_pretrained(model)
    store = ImageStore.for_model(tmp_path, images, 10_000, cache_bytes=0)
    reader = PromptReader(str(model), store, trust=trust)
    parts = (policy.vlm, reader.config, reader.processor)
    assert [type(one).__module__.endswith(".own") for one in parts] == [trust] * 3


def test_trust_is_of_the_configs_model_and_of_nothing_put_in_its_place(tmp_path: Path) -> None:
    """A checkpoint evaluated with the run's config, say."""
    (tmp_path / "model").mkdir()
    model = str(tmp_path / "model")
    config = Config(
        run=RunConfig(name="r"),
        model=ModelConfig(path=model, trust_remote_code=model),
        data=DataConfig(train="d"),
    )
    assert contradictions(config) == []
    assert model_at(config, model).runs_code
    assert not model_at(config, str(tmp_path)).runs_code
    other = config.model.model_copy(update={"trust_remote_code": "lab/model"})
    (told,) = contradictions(config.model_copy(update={"model": other}))
    assert "model.trust_remote_code: got 'lab/model', needs model.path" in told
    assert not ModelConfig(path=model).runs_code


def test_a_store_on_loopback_listens_nowhere_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    store = open_store("127.0.0.1", port, 1, is_master=True)
    store.set("key", "value")
    assert open_store("127.0.0.1", port, 1, is_master=False).get("key") == b"value"
    connections = psutil.Process().net_connections("inet")
    found = {c.laddr.ip for c in connections if c.laddr.port == port and c.status == "LISTEN"}
    assert found == {"127.0.0.1"}
