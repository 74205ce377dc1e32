"""The command line: help at once, what was meant, functions called with the right arguments, errors in one message."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from detres import cli
from detres.config import SourceConfig
from detres.config import Config
from detres.data.images import ImageError
from detres.engine import distributed
from detres.engine import train as engine_train
from detres.evaluation import run as evaluation_run
from detres.inference import run as inference_run

ROOT = Path(__file__).resolve().parents[1]


class Call:
    """Stands in for a function: refuses arguments that the real one would, and keeps those of its last call."""

    def __init__(self, monkeypatch, module, name: str, raises: BaseException | None = None):
        self.signature, self.raises = inspect.signature(getattr(module, name)), raises
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        self.arguments = self.signature.bind(*args, **kwargs).arguments
        if self.raises:
            raise self.raises


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("train: {steps: 7}\n")
    return tmp_path


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _usage_error(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


# ---- help


def test_help_is_instant_and_imports_nothing_heavy():
    code = ("import sys\nfrom detres.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'torchvision', 'pydantic', 'numpy', 'cv2', 'rich', 'PIL', 'yaml'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)")
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.monotonic() - start)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 1 and "examples:" in result.stdout


@pytest.mark.parametrize("command", [name.split() for name in cli.EXAMPLES], ids=" ".join)
def test_every_command_has_a_description_and_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    description, examples = text.split("\n\n")[1], text.split("examples:\n")[1]
    assert description.endswith(".") or "key=value" in text
    assert f"  {' '.join(['detres', *command])} " in f"{examples} ".replace("\n", " \n")


@pytest.mark.parametrize("line", [line.strip() for text in cli.EXAMPLES.values() for line in text.splitlines()
                                  if line.strip().startswith("detres ")])
def test_examples_are_valid(line):
    arguments = shlex.split(line.split("   ")[0].partition(" > ")[0])[1:]
    if "COMMAND" in arguments or arguments[-1] == "--help":
        return
    args, rest = cli.build_parser().parse_known_args(arguments)
    args.parser.check_rest(rest)
    assert not rest or args.rest
    for word in arguments:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


def test_no_command_and_version(capsys):
    assert cli.main([]) == 0 and "examples:" in capsys.readouterr().out
    assert cli.main(["data"]) == 0 and "shapes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])


# ---- what was meant


@pytest.mark.parametrize("argv, expected", [
    (["trian"], "Did you mean train?"), (["check", "a"], "Did you mean detres data check?"),
    (["data", "shape"], "Did you mean shapes?"),
    (["train", "a.yaml", "--resum"], "unknown option --resum. Did you mean --resume?"),
    (["train", "a.yaml", "--num-gpu=2"], "unknown option --num-gpu=2. Did you mean --num-gpus?"),
    (["train"], "required: config\n"), (["eval", "a", "--metrics", "vco"], "Did you mean voc?"),
    (["demo", "train.lr=1"], "unexpected arguments: train.lr=1"),
    (["localize", "a", "--regions", "b", "eval.crops=dense"], "got 'eval.crops=dense'; key=value goes before this option"),
    (["train", "a.yaml", "--num-gpus", "0"], "must be an integer >= 1, got '0'"),
    (["train", "a.yaml", "--num-gpus", "x"], "must be an integer >= 1, got 'x'"),
    (["predict", "a", "b.jpg", "--score-thresh", "1.5"], "must be a number from 0 to 1, got '1.5'"),
    (["data", "shapes", "out", "--images", "2", "--preset", "eas"], "Did you mean easy?"),
])
def test_usage_errors(argv, expected, capsys):
    error = _usage_error(capsys, *argv)
    assert expected in error and "--help" in error and "Traceback" not in error


# ---- commands call the library


def test_train_takes_options_and_overrides_in_any_order(folder, monkeypatch):
    call = Call(monkeypatch, engine_train, "train")
    assert cli.main(["train", "a.yaml", "train.lr=1", "--resume", "train.lr=2", "output=x"]) == 0
    config = call.arguments["config"]
    assert (config.train.steps, config.train.lr, config.output) == (7, 2, "x") and call.arguments["resume"] is True
    assert cli.main(["train", "--num-gpus", "1", "a.yaml"]) == 0
    assert call.arguments == {"config": Config.model_validate({"train": {"steps": 7}}), "resume": False}


def test_train_on_several_gpus_launches_itself(folder, monkeypatch):
    launch, train = Call(monkeypatch, distributed, "launch", SystemExit(0)), Call(monkeypatch, engine_train, "train")
    with pytest.raises(SystemExit):
        cli.main(["train", "a.yaml", "train.lr=1", "--num-gpus", "2", "output=a b", "--resume"])
    assert launch.arguments["processes"] == 2
    module, *argv = launch.arguments["command"][1:]
    assert module == "detres.cli" and cli.main(argv) == 0
    assert train.arguments["config"].output == "a b" and train.arguments["resume"] is True
    assert cli.main(["train", "a.yaml", "--num-gpus", "2", "train.lr=-1"]) == 1, "checked before anything is launched"


def test_eval_and_predict(monkeypatch):
    call = Call(monkeypatch, evaluation_run, "evaluate_weights")
    assert cli.main(["eval", "runs/a", "--data", "d", "--split", "test", "--metrics", "coco", "voc", "--batch-size",
                     "3", "--save", "r.json", "--json", "n.json", "--errors", "e", "--device", "cpu"]) == 0
    assert call.arguments == {"path": "runs/a", "data": "d", "split": "test", "save": Path("r.json"),
                              "metrics": ["coco", "voc"], "batch_size": 3, "device": "cpu", "overrides": [],
                              "numbers": Path("n.json"), "errors": Path("e")}
    assert cli.main(["eval", "runs/a", "data.workers=0", "--device", "cpu", "eval.batch_size=4"]) == 0
    assert call.arguments == {"path": "runs/a", "data": None, "split": None, "save": None, "metrics": None,
                              "batch_size": None, "device": "cpu", "overrides": ["data.workers=0", "eval.batch_size=4"],
                              "numbers": None, "errors": None}
    call = Call(monkeypatch, inference_run, "predict_files")
    assert cli.main(["predict", "w", "a.jpg", "--out", "o", "b/", "--score-thresh", "0.3", "c/*.png"]) == 0
    assert call.arguments == {"weights": "w", "inputs": ["a.jpg", "b/", "c/*.png"], "out": Path("o"),
                              "score_thresh": 0.3, "device": "auto", "batch_size": 8, "overrides": []}


def test_several_weights_are_an_ensemble(folder, monkeypatch):
    call = Call(monkeypatch, evaluation_run, "evaluate_weights")
    assert cli.main(["eval", "runs/a", "runs/b", "eval.batch_size=4", "--device", "cpu", "c=d.safetensors/x",
                     "data.workers=0"]) == 0
    assert call.arguments["path"] == ["runs/a", "runs/b"]
    assert call.arguments["overrides"] == ["eval.batch_size=4", "c=d.safetensors/x", "data.workers=0"]
    assert cli.main(["eval", "runs/a", "runs/lr=0.1"]) == 0
    assert call.arguments["path"] == ["runs/a", "runs/lr=0.1"] and not call.arguments["overrides"]
    Path("run", "checkpoints").mkdir(parents=True)
    for name in ("run/checkpoints/final.safetensors", "b.safetensors", "x=1.jpg"):
        Path(name).touch()
    call = Call(monkeypatch, inference_run, "predict_files")
    assert cli.main(["predict", "a", "run", "b.safetensors", "x=1.jpg", "run", "model.rpn.nms_thresh=0.5"]) == 0
    assert call.arguments["weights"] == ["a", "run", "b.safetensors"]
    assert call.arguments["inputs"] == ["x=1.jpg", "run"]  # after an image, a run is a folder of images
    assert call.arguments["overrides"] == ["model.rpn.nms_thresh=0.5"]


def test_config(folder, capsys):
    assert cli.main(["config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == Config().train.steps
    assert cli.main(["config", "a.yaml", "train.lr=3"]) == 0
    printed = capsys.readouterr().out
    assert "  # a.yaml:1" in printed and "  # command line" in printed and "\x1b" not in printed
    assert cli.main(["config", "train.lr=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["lr"] == 3
    assert cli.main(["config", "--schema"]) == 0
    assert "base" in json.loads(capsys.readouterr().out)["properties"]


def test_config_dims_defaults_in_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["config", "a.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("\x1b[2m") == line.endswith("# default\x1b[0m") for line in lines)
    assert any("steps: 7" in line and "\x1b" not in line for line in lines)


def test_config_into_a_closed_pipe():
    command = f"{shlex.quote(sys.executable)} -m detres.cli config | true"  # `true` is gone before anything is written
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


def test_data_shapes(folder):
    options = ["--images", "1", "--val", "0", "--size", "32", "48", "--preset", "easy"]
    assert cli.main(["data", "shapes", "both", *options]) == 0
    assert cli.main(["data", "shapes", "coco", *options, "--no-voc"]) == 0
    image = next(iter(json.loads(next(Path("coco").rglob("instances_*.json")).read_text())["images"]))
    assert (image["height"], image["width"]) == (32, 48)
    assert list(Path("both").rglob("*.xml")) and not list(Path("coco").rglob("*.xml"))


def test_demo(monkeypatch):
    from detres import demo

    call = Call(monkeypatch, demo, "run_demo")
    assert cli.main(["demo"]) == 0 and list(call.arguments.values()) == [Path("runs/demo")]


# ---- errors


def test_known_errors_are_one_message(folder, capsys):
    for argv, expected in ((["train", "nope.yaml"], "config file must exist, got nope.yaml"),
                           (["config", "train.lr=x"], "train.lr must be a number > 0, got x"),
                           (["eval", "nope"], "nope"), (["predict", "nope", "nothing*.jpg"], "nothing*.jpg"),
                           (["data", "shapes", "x", "--images", "1", "--size", "1", "1"], "size must")):
        assert cli.main(argv) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("detres: error: ") and expected in captured.err
        assert "Traceback" not in captured.err and captured.out == ""


def _our_error(kind):
    """As if raised by a statement of a module of detres."""
    scope = {}
    exec(compile("def f(kind):\n    raise kind('what must be so')\n", cli.__file__, "exec"), scope)
    return lambda: scope["f"](kind)


@pytest.mark.parametrize("error", [FileNotFoundError("a"), PermissionError("a"), ImageError("a")])
def test_errors_of_the_system_and_of_our_own_kinds(error, capsys):
    def fail():
        raise error

    assert cli.run_guarded(fail) == 1 and capsys.readouterr().err == "detres: error: a\n"
    with pytest.raises(type(error)):
        cli.run_guarded(fail, debug=True)


def test_raised_on_purpose_or_a_bug(monkeypatch, capsys):
    """The same ValueError: one message from a `raise` in detres, a traceback from anywhere else."""
    monkeypatch.setattr(cli.linecache, "getline", lambda *_: "    raise ValueError('what')")
    assert cli.run_guarded(_our_error(ValueError)) == 1
    assert capsys.readouterr().err == "detres: error: what must be so\n"
    monkeypatch.setattr(cli.linecache, "getline", lambda *_: "    x = compute()")
    with pytest.raises(ValueError, match="what must be so"):
        cli.run_guarded(_our_error(ValueError))
    monkeypatch.undo()
    with pytest.raises(ValueError):
        cli.run_guarded(lambda: json.loads(""))  # raised by a statement, but not ours


def test_debug_shows_the_traceback(folder):
    from detres.config_file import ConfigError

    with pytest.raises(ConfigError):
        cli.main(["config", "train.lr=x", "--debug"])


def test_interrupt(monkeypatch, folder, capsys):
    Call(monkeypatch, engine_train, "train", KeyboardInterrupt())
    assert cli.main(["train", "a.yaml"]) == 130 and capsys.readouterr().err == "interrupted\n"


# ---- tools


def test_tools_train_net(folder, monkeypatch, capsys):
    call = Call(monkeypatch, engine_train, "train")
    main = _tool("train_net").main
    assert main(["--config-file", "a.yaml", "--num-gpus", "1", "train.lr=2", "--resume", "output=x"]) == 0
    config = call.arguments["config"]
    assert config.train.lr == 2 and config.output == "x" and call.arguments["resume"]
    assert main(["--config-file", "nope.yaml"]) == 1 and "must exist" in capsys.readouterr().err
    launch = Call(monkeypatch, distributed, "launch", SystemExit(0))
    with pytest.raises(SystemExit):
        main(["--config-file", "a.yaml", "--num-gpus", "2"])
    assert launch.arguments["processes"] == 2


def test_tools_train_net_eval_only(folder, monkeypatch, capsys):
    call = Call(monkeypatch, evaluation_run, "evaluate_weights")
    main = _tool("train_net").main
    overrides = ["output=runs/x", "data.val={path: d, split: s}", "eval.metrics=[voc]", "model.rpn.nms_thresh=0.5"]
    assert main(["--config-file", "a.yaml", "--eval-only", *overrides]) == 0
    assert call.arguments == {"path": "runs/x", "data": SourceConfig(path="d", split="s"), "metrics": ("voc",),
                              "batch_size": 1, "device": "auto", "overrides": overrides}
    assert main(["--config-file", "a.yaml", "--eval-only", "trian.lr=1"]) == 1
    assert "Did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["evaluate", "predict", "train_net"])
def test_tools_run_as_scripts(tool):
    result = subprocess.run([sys.executable, f"tools/{tool}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage:" in result.stdout
