"""The command ``umm-kit``: train, diagnose, extract, evaluate, drift, audit, check, info, reproduce, notebooks, figures.

Every subcommand takes ``--config FILE.yaml`` whose keys are its options; what stands on the command line wins. A user's
mistake is one line and exit status 2; ``--traceback`` shows where it came from. Heavy imports wait for the subcommand.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from umm_kit import __version__

#: what `umm-kit train` can train -> (module, its config dataclass, its function of a config)
TRAINERS = {
    "tokenizer": ("umm_kit.trainers.tokenizer", "TokenizerConfig", "train"),
    "masked": ("umm_kit.trainers.pretrain", "PretrainConfig", "train"),
    "autoregressive": ("umm_kit.trainers.pretrain", "AutoregressiveConfig", "train"),
    "flow": ("umm_kit.trainers.pretrain", "FlowConfig", "train"),
    "teacher": ("umm_kit.trainers.teacher", "TeacherConfig", "train"),
    "diva": ("umm_kit.trainers.diva", "DIVAConfig", "train"),
    "aligner": ("umm_kit.trainers.latentumm", "AlignerConfig", "train_aligner"),
    "latentumm": ("umm_kit.trainers.latentumm", "LatentUMMConfig", "train"),
    "preference": ("umm_kit.trainers.preference", "PreferenceConfig", "train"),
}
#: name -> module of umm_kit.experiments, and the function in it that does what has no record yet and returns a report
EXPERIMENTS = {
    "atlas": ("atlas", "run"),
    "diva-tuning": ("diva", "tune"),
    "diva": ("diva", "run"),
    "latentumm-tuning": ("latentumm", "tune"),
    "latentumm": ("latentumm", "run"),
    "frontier": ("frontier", "run"),
    "planted": ("planted", "run"),
    "intervention": ("intervention", "run"),
    "families": ("families", "run"),
}
HEADLINES = ("caption_f1", "qa_existence", "qa_relation", "generation_overall", "inpainting_objects")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (a claim or a check failed), 2 (a user's mistake) or 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    name = argv[0] if argv and argv[0] in commands else ""
    try:
        if name == "train" and len(argv) > 1 and argv[1] in TRAINERS:  # its options are known only after a heavy import
            return train(argv[1], argv[2:])
        path = _common().parse_known_args(argv)[0].config
        if name and path:
            argv[1:1] = config_options(commands[name], path)
        args = parser.parse_args(argv, argparse.Namespace(argv=argv))
        return args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        if "--traceback" in argv:
            raise
        print(f"umm-kit {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"umm-kit {name}: interrupted", file=sys.stderr)
        return 130


def _common() -> argparse.ArgumentParser:
    """The options that every command has."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; those on the command line win")
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    return parser


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all commands, and each command's own."""
    parser = argparse.ArgumentParser(prog="umm-kit", description=str(sys.modules["umm_kit"].__doc__).splitlines()[0])
    parser.add_argument("--version", action="version", version=f"umm-kit {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}
    model = ("model", {"metavar": "MODEL", "help": "a shipped model (see umm-kit info) or a folder"})
    split = ("--split", {"default": "test", "help": "of the data (default: %(default)s)"})
    seed = ("--seed", {"type": int, "default": 1, "help": "of data and decoding (default: %(default)s)"})
    texture = ("--texture", {"choices": ("none", "mid", "high"), "default": "mid", "help": "of scenes (default: %(default)s)"})
    dtype = ("--dtype", {"default": "float32", "help": "of the weights; bfloat16 halves them (default: %(default)s)"})
    device = ("--device", {"default": "auto", "help": "as cpu, cuda:1, or cuda:0,cuda:1, which share layers (default: auto)"})
    data = ("--data", {"default": "shapes", "help": "shapes, digits, or an image-text folder (default: %(default)s)"})
    guidance = ("--guidance", {"type": float, "default": 3.0, "help": "classifier-free; 1: none (default: %(default)s)"})
    chance = ("--temperature", {"type": float, "default": 1.0, "help": "of drawing (default: %(default)s)"})
    record = ("--output", {"type": Path, "metavar": "FILE.json", "help": "also write all of it, with the record of the run"})
    folder = ("--notebooks", {"default": "notebooks", "metavar": "FOLDER", "help": "(default: %(default)s)"})

    def command(run: Callable[..., int], *shared: tuple[str, dict[str, Any]]) -> argparse.ArgumentParser:
        name, summary = run.__name__, str(run.__doc__)
        sub = subparsers.add_parser(name, parents=[_common()], help=summary, description=summary, allow_abbrev=False)
        for option, details in shared:
            sub.add_argument(option, **details)
        sub.set_defaults(run=run)
        commands[name] = sub
        return sub

    commands["train"] = subparsers.add_parser("train", help="train a model", description="train a model or a tokenizer")
    commands["train"].add_argument("what", choices=sorted(TRAINERS), help="options of one: umm-kit train masked --help")

    sub = command(evaluate, model, dtype, device, split, seed, texture, record, data, guidance, chance)
    sub.add_argument("--n", type=int, help="items (default: 512 scenes of shapes, or all there are of anything else)")
    sub.add_argument("--prompts", type=int, default=64, help="drawn per category (default: %(default)s)")

    sub = command(diagnose, model, dtype, device, split, seed, texture, record, data)
    sub.add_argument("--n", type=int, help="anchors (default: 512 scenes of shapes, or all there are of anything else)")
    sub.add_argument("--panels", nargs="+", metavar="PANEL", help="some of gradients residual rank spectrum similarity")
    sub.add_argument("--mask-ratios", nargs="+", type=float, default=[0.2, 0.4, 0.6], help="(default: 0.2 0.4 0.6)")
    sub.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw DIVA's Figure 2 of this model")
    sub.add_argument("--untrained", action="store_true", help="beside a twin with random weights: takes twice as long")
    sub.add_argument("--along", action="store_true", help="only gradient conflict, at each checkpoint that is kept in MODEL")

    sub = command(extract, model, dtype, device, split, seed, texture, data)
    sub.add_argument("folder", type=Path, help="for the shards; a stopped run goes on in it")
    items = "as --n elsewhere, which torchrun would take for an option of its own (default: 512 scenes of shapes, or all)"
    sub.add_argument("--items", dest="n", type=int, metavar="N", help=items)
    sub.add_argument("--layers", nargs="+", type=int, help="0 is the embedding (default: all)")
    sub.add_argument("--tokens", action="store_true", help="keep the state of every image token, not their mean")
    sub.add_argument("--batch-size", type=int, default=64, help="examples per shard (default: %(default)s)")

    sub = command(drift, model, dtype, device, split, seed, texture, record, data, guidance, chance)
    sub.add_argument("--n", type=int, help="items (default: 512 scenes of shapes, or all there are of anything else)")
    sub.add_argument("--cycles", type=int, default=8, help="of text to image to text (default: %(default)s)")
    sub.add_argument("--start", choices=("text", "image"), default="text", help="(default: %(default)s)")
    sub.add_argument("--repeats", type=int, default=1, help="runs with other noise (default: %(default)s)")
    sub.add_argument("--teacher", metavar="NAME", help="tiny-teacher, or a CLIP-like model (folder, cached id) to see by, too")
    sub.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw what survives")
    bench = (
        "instead one cycle as UnifiedBench has it, by a CLIP-like model or a vision transformer such as DINO (folder, cached id)"
    )
    sub.add_argument("--unified-bench", metavar="NAME", help=bench)

    sub = command(audit, model, split, seed, texture, record)
    sub.add_argument("--n", type=int, default=2000, help="scenes (default: %(default)s)")

    command(check, model)
    sub = command(info)
    sub.add_argument("model", nargs="?", metavar="MODEL", help="say instead how large a model is and what training it would take")

    sub = command(reproduce, folder)
    sub.add_argument("what", nargs="?", choices=("notebooks", *EXPERIMENTS), default="notebooks", help="(default: %(default)s)")
    sub.add_argument("--preset", help="of sizes: full or tiny (diva and latentumm: tiny alone; atlas: also bases, roomy)")
    sub.add_argument("--output", default="build", metavar="FOLDER", help="executed notebooks and figures (default: %(default)s)")
    sub.add_argument("--records", type=Path, metavar="FILE.jsonl", help="of an experiment (default: experiments/WHAT.jsonl)")
    sub.add_argument("--runs", default="runs", metavar="FOLDER", help="of an experiment's models (default: %(default)s)")
    sub.add_argument("--arms", nargs="+", metavar="ARM", help="of diva, latentumm (and their tuning) and families: only these")
    sub.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of an experiment's trainings, for those of the preset")
    sub.add_argument("--part", default="1/1", metavar="K/M", help="every M-th run, from the K-th: M processes share the work")

    sub = command(notebooks, folder)
    sub.add_argument("names", nargs="*", metavar="NAME", help="such as 00_start_here (default: all)")

    sub = command(figures)
    sub.add_argument("--folder", default="figures", help="holds data/*.json and the style (default: %(default)s)")
    return parser, commands


def config_options(parser: argparse.ArgumentParser, path: str | Path) -> list[str]:
    """The options in a YAML file, as they would stand on the command line of ``parser``.

    Raises:
        ValueError: if the file is not a mapping or has a key that is no option of this command.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping of options to values")
    known = {o.lstrip("-").replace("-", "_"): (o, action) for action in parser._actions for o in action.option_strings}
    positional = {action.dest: action for action in parser._actions if not action.option_strings}
    out: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in positional:  # no longer needed on the command line, where it still wins
            action = positional[name]
            action.default, action.required, action.nargs = value, False, action.nargs or "?"
            continue
        if name not in known or name in ("config", "help", "h"):
            hint = difflib.get_close_matches(name, [*known, *positional], n=1)
            raise ValueError(f"{path}: {key!r} is no option of {parser.prog}" + (f"; did you mean {hint[0]!r}?" if hint else ""))
        option, action = known[name]
        if value is None:
            continue
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {key} is {value!r}; expected true or false")
            out += [option] if value else []
        elif isinstance(value, list):
            out += [option, *map(str, value)]
        else:
            out.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return out


# The docstring of a command is its help text.


def train(what: str, options: Sequence[str]) -> int:
    """Parse the trainer's config dataclass from the file and the flags, then train."""
    import torch.distributed as dist
    from transformers import HfArgumentParser

    module, config_class, function = TRAINERS[what]
    trainer = import_module(module)
    dataclass = getattr(trainer, config_class)
    parser = HfArgumentParser(dataclass, prog=f"umm-kit train {what}", parents=[_common()], allow_abbrev=False)
    path = _common().parse_known_args(options)[0].config
    options = [*(config_options(parser, path) if path else []), *options]
    config, _ = parser.parse_args_into_dataclasses(args=options, look_for_args_file=False)
    getattr(trainer, function)(config)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # Gloo's threads may abort a process that ends with its group alive
    return 0


def _opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the data that the arguments name."""
    import umm_kit as uk
    from umm_kit.data import open_data

    if args.n is not None and args.n < 1:
        raise ValueError(f"--n is {args.n}; expected at least 1")
    if args.data not in ("shapes", "digits") and args.n is not None:
        raise ValueError("--n does not apply to a folder, which is read as a whole; leave it out")
    if args.data != "shapes" and args.texture != "mid":
        raise ValueError(f"--texture is of scenes, but --data is {args.data!r}; leave it out")
    more: dict[str, Any] = {"nuisance": uk.Nuisance(texture=args.texture)} if args.data == "shapes" else {}
    if args.data not in ("shapes", "digits") and getattr(args, "start", "text") == "image":
        more["captions"] = False  # what starts from pictures asks for none
    model, n = uk.load(args.model, args.device, args.dtype), args.n or (512 if args.data == "shapes" else None)
    return model, open_data(args.data, args.split, n=n, seed=args.seed, image_size=model.image_size, **more)


def _draw(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")


def _keep(found: Any, args: argparse.Namespace) -> int:
    """Say how long a result took, and write and draw it where that was asked for."""
    print(f"{found.record['seconds']:.0f} seconds on {found.record['device']}")
    if args.output:
        found.save(args.output)
        print(f"written to {args.output}")
    if getattr(args, "figure", None):
        _draw(found.plot(), args.figure)
    return 0


def _keep_rows(frame: Any, data: Any, args: argparse.Namespace) -> int:
    """Write a table, where that was asked for, with what stands behind it."""
    from umm_kit.records import command, machine, versions, write_json

    if args.output:
        record = {"command": command(args.argv), "data": repr(data), "versions": versions(), "device": machine()}
        write_json(args.output, {"record": record, "rows": frame.to_dict("records")})
    return 0


def diagnose(args: argparse.Namespace) -> int:
    """see, layer by layer, where understanding and generation part (DIVA Fig. 2), beside nulls, with intervals"""
    import umm_kit as uk
    from umm_kit.diagnostics.gradients import conflict_along
    from umm_kit.diagnostics.report import PANELS
    from umm_kit.records import command

    model, data = _opened(args)
    if args.along:
        ratios = min(args.mask_ratios), max(args.mask_ratios)
        frame = conflict_along(args.model, data, mask_ratio=ratios, seed=args.seed)
        print(frame.pivot_table(index="step", columns="metric", values="value").to_string(float_format="%.3f"))
        return _keep_rows(frame, data, args)
    if args.untrained and not hasattr(model, "untrained"):
        raise ValueError(f"--untrained: {args.model!r} is not of a family of ours; pass a twin to uk.diagnose(untrained=...)")
    twin, ratios = model.untrained() if args.untrained else None, args.mask_ratios
    found = uk.diagnose(model, data, args.panels or PANELS, mask_ratios=ratios, untrained=twin, seed=args.seed)
    found.record["command"] = command(args.argv)
    print(found.summary())
    return _keep(found, args)


def extract(args: argparse.Namespace) -> int:
    """write the states of both flows to shards, by id; under torchrun every process makes its share"""
    from umm_kit.features import extract as run
    from umm_kit.features import processes

    model, data = _opened(args)
    run(model, data, layers=args.layers, pooled=not args.tokens, seed=args.seed, batch_size=args.batch_size, folder=args.folder)
    print(f"process {processes()[0] + 1} of {processes()[1]}: its shards of {len(data)} examples are in {args.folder}")
    return 0


def drift(args: argparse.Namespace) -> int:
    """take a model around text to image to text, and say what is left of the meaning after every cycle, with intervals"""
    import umm_kit as uk
    from umm_kit.evaluation.blame import unified_bench
    from umm_kit.models.teachers import load_teacher
    from umm_kit.records import command

    model, data = _opened(args)
    teacher = load_teacher(args.teacher) if args.teacher else None
    decoding = uk.Decoding(guidance=args.guidance, temperature=args.temperature)
    if args.unified_bench:
        table = unified_bench(model, data, load_teacher(args.unified_bench).embed_image, args.seed, decoding=decoding)
        print(table.to_string(index=False, float_format="%.3f"))
        return _keep_rows(table, data, args)
    found = uk.drift(model, data, args.cycles, args.start, args.repeats, args.seed, teacher=teacher, decoding=decoding)
    found.record |= {"model": args.model, "command": command(args.argv)}
    frame = found.to_frame()
    kept = frame.pivot_table(index="cycle", columns="metric", values="value", sort=False)
    print(found, kept.to_string(float_format="%.3f"), sep="\n")
    return _keep(found, args)


def evaluate(args: argparse.Namespace) -> int:
    """score understanding, generation and inpainting by the oracle: each metric with its interval, chance level and n"""
    import umm_kit as uk
    from umm_kit.records import command

    model, data = _opened(args)
    decoding = uk.Decoding(guidance=args.guidance, temperature=args.temperature)
    result = uk.evaluate(model, data, seed=args.seed, n_prompts=args.prompts, decoding=decoding)
    result.record |= {"model": args.model, "command": command(args.argv)}
    print(result)
    _keep(result, args)
    if args.output and (args.output.parent / "run.json").exists():
        from umm_kit.models.card import write_card

        print(f"and {write_card(args.output.parent)}")
    return 0


def audit(args: argparse.Namespace) -> int:
    """say how far the oracle (on clean, damaged and reconstructed pictures) and the image tokenizer can be trusted"""
    import pandas as pd

    import umm_kit as uk
    from umm_kit.evaluation.reconstruction import audit_pictures
    from umm_kit.records import command, machine, versions, write_json

    model = uk.load(args.model)
    nuisance = uk.Nuisance(texture=args.texture)
    data = uk.Shapes(args.split, n=args.n, seed=args.seed, image_size=model.image_size, nuisance=nuisance)
    result = audit_pictures(model.image_tokenizer, data, args.seed)
    columns = ["exact", "unclear", "silent", "false_accept", "n", "n_edits"]
    frame = pd.DataFrame(result["oracle"]).T[columns].astype({"n": int, "n_edits": int})
    print(frame.to_string(float_format="%.4f"), "\n\nR^2 of each nuisance factor read off the pictures:", sep="")
    print(pd.DataFrame(result["nuisance_r2"]).T.to_string(float_format="%.3f"))
    use = result["codebook"]
    print(f"\n{use['used']} of {use['size']} codes used, perplexity {use['perplexity']:.0f}; PSNR {result['psnr_db']:.1f} dB")
    if args.output:
        write_json(args.output, {"command": command(args.argv), "versions": versions(), "device": machine(), **result})
        print(f"written to {args.output}")
    return 0


def check(args: argparse.Namespace) -> int:
    """say what a model meets of the contract, and what is missing; fails if it is not even diagnosable"""
    import umm_kit as uk

    model = uk.load(args.model)
    data = uk.Shapes("test", n=2, seed=0, image_size=model.image_size)
    report = uk.check_model(model, uk.collate([data[i] for i in range(len(data))]))
    print(report)
    return 0 if "diagnosable" in report.tier else 1


def info(args: argparse.Namespace) -> int:
    """show versions, device, memory, disk, and the shipped models with their scores; or what one MODEL would take"""
    import platform
    import shutil

    import psutil
    import torch

    from umm_kit.models.base import product_rate, resolve_device
    from umm_kit.records import versions

    if args.model:
        from umm_kit.models.sizes import sizes

        found, device = sizes(args.model), resolve_device()
        gpu = device.type == "cuda"  # in the precision that training takes there
        rate = product_rate(device, torch.bfloat16 if gpu else torch.float32, 4096 if gpu else 512, 0.05)
        print(found)
        work = found.operations()
        print(f"A step of 8 pairs on both flows is {work:.2g} operations: at least {work / rate:.2g} s on this device")
        return 0
    print(", ".join(map(" ".join, versions().items())))
    print(f"{platform.platform()}, {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, device {resolve_device()}")
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    print(f"memory {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, disk {disk.free / 1e9:.1f} GB free\n")
    shipped = sorted(path.parent for path in (Path(__file__).parent / "checkpoints").glob("*/config.json"))
    print(f"shipped models ({len(shipped)}):" + ("" if shipped else " none in this installation"))
    for path in shipped:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"  {path.name} ({size / 1e6:.1f} MB): {_headline(path / 'scores.json')}")
    return 0


def _headline(path: Path) -> str:
    """The headline scores that ``umm-kit evaluate --output`` wrote beside a shipped model."""
    if not path.exists():
        return "no scores recorded"
    content = json.loads(path.read_text(encoding="utf-8"))
    metrics = {row["metric"]: f"{row['value']:.3f} (n={row['n']})" for row in content["metrics"]}
    chosen = [name for name in HEADLINES if name in metrics] or list(metrics)[:4]
    return ", ".join(f"{name} {metrics[name]}" for name in chosen) + f" on {content['record']['data']}"


def reproduce(args: argparse.Namespace) -> int:
    """run every notebook and compare what comes out with what is claimed; or an experiment, from its records on"""
    if args.what == "notebooks":
        from umm_kit.reproduce import reproduce as run

        if args.arms or args.seeds:
            raise ValueError("--arms and --seeds are of experiments; name one, such as diva")
        return 0 if run(args.notebooks, args.output, args.preset or "full") else 1
    module, function = EXPERIMENTS[args.what]
    experiment = import_module(f"umm_kit.experiments.{module}")
    preset = args.preset or next(iter(experiment.PRESETS))
    if preset not in experiment.PRESETS:
        raise ValueError(f"--preset is {preset!r}; {args.what} has {', '.join(experiment.PRESETS)}")
    part = [int(number) for number in args.part.split("/") if number.isdigit()]
    if len(part) != 2 or not 1 <= part[0] <= part[1]:
        raise ValueError(f"--part is {args.part!r}; expected K/M with 1 <= K <= M, such as 1/2")
    records = args.records or Path("experiments") / f"{args.what}.jsonl"
    chosen = experiment.PRESETS[preset]
    asked = {name: tuple(given) for name in ("arms", "seeds") if (given := getattr(args, name))}
    for option in asked:
        if not isinstance(getattr(chosen, option, None), tuple) or (option, function) == ("seeds", "tune"):
            raise ValueError(f"--{option} does not apply to {args.what}")  # trials have a seed of their own
    if "seeds" in asked and hasattr(chosen, "few_seeds"):
        if chosen.tuning_seed in asked["seeds"]:
            raise ValueError(f"--seeds {chosen.tuning_seed} is the seed that learning rates were chosen with; take others")
        asked["few_seeds"] = asked["seeds"][: len(chosen.few_seeds)]
    chosen = replace(chosen, **asked)
    print(getattr(experiment, function)(chosen, records, Path(args.runs) / args.what, (part[0], part[1])))
    return 0


def notebooks(args: argparse.Namespace) -> int:
    """refresh the committed notebooks from their sources, with outputs"""
    from umm_kit.reproduce import refresh

    return 0 if refresh(args.notebooks, args.names) else 1


def figures(args: argparse.Namespace) -> int:
    """redraw figures/ as PNG and PDF from the numbers in figures/data"""
    from umm_kit.figures import redraw

    print("\n".join(map(str, redraw(args.folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
