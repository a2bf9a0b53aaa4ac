"""Arguments in, text out. Results go to stdout, progress and errors to stderr; each command imports what it needs, when it runs."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nascompile.errors import DataError, NascompileError, RecipeError

if TYPE_CHECKING:
    from nascompile.pipeline import TableUse
    from nascompile.progress import Progress
    from nascompile.settings import Recipe

STAGES = {
    "profile": "Time the operators of the model's search space on the device, or find a table that has them; what it lacks is added.",
    "finetune": "Train the teacher and the super-network; with --candidate, one of the finished front by itself.",
    "search": "Search sub-networks and precisions; writes the Pareto front. Ctrl-C ends it with what it has, twice quits.",
    "build": "Build the engines of the front's best candidates and of the baselines; with --candidate, one more.",
    "measure": "Run the engines: latency, throughput, memory, validation score.",
    "rerank": "Correct the predictions by the measurements, choose an engine, then read test once.",
    "report": "Write the report of a run.",
}
"""Stages that are commands, with their help."""


class Commands(TyperGroup):
    """Prints expected failures as `error: … hint: …` and exits 1; 130 for Ctrl-C. Anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NascompileError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted; run the same command again to continue", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="nascompile",
    cls=Commands,
    help="From a pretrained model, a task and a device to the engine that device should run.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tables = typer.Typer(help="Latency tables: show, validate, compare, merge, export.", no_args_is_help=True)
app.add_typer(tables, name="table")
kits = typer.Typer(help="Kits: fill a latency table on a device that is not here.", no_args_is_help=True)
app.add_typer(kits, name="kit")


def main() -> None:
    """Entry point of `nascompile`."""
    from nascompile import processes

    try:
        app()
    except SystemExit as end:
        processes.leave(end.code)
        raise


# ---------------------------------------------------------------------------------------------- flags


def minutes(text: str) -> float:
    """Minutes of `90s`, `30m`, `2h` or `1h30m`."""
    units = {"h": 60.0, "m": 1.0, "s": 1 / 60}
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise typer.BadParameter(f"not a duration: {text} (like 90s, 30m, 2h or 1h30m)")
    return sum(float(number) * units[unit] for number, unit in parts)


@dataclass(frozen=True)
class Flag:
    """A flag and the one setting of the recipe that it sets."""

    name: str
    setting: str
    kind: Any
    help: str
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        return "set_" + self.name.partition("/")[0].lstrip("-").replace("-", "_")

    def option(self, panel: str) -> inspect.Parameter:
        """How typer is told about it; not given is None."""
        parser: dict[str, Any] = {"parser": minutes} if self.setting == "minutes" else {}
        info = typer.Option(self.name, help=self.help, metavar=self.metavar, rich_help_panel=panel, show_default=False, **parser)
        return inspect.Parameter(self.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[self.kind | None, info])


FLAGS = {
    "Model and data": (
        Flag("--model", "model", str, "Hugging Face id, local folder (safetensors), or a model by name: demo, toy, mcu_vit.", "ID|FOLDER"),
        Flag("--new-head", "new_head", bool, "Train a new head although the model has one."),
        Flag("--data", "data.data", str, "CSV, TSV, JSONL or Parquet file, image folder, or `datasets` name or folder.", "SOURCE"),
        Flag("--validation", "data.validation", str, "Validation data; default: split off, seeded.", "SOURCE"),
        Flag("--test", "data.test", str, "Test data; default: split off, seeded.", "SOURCE"),
        Flag("--calibration", "data.calibration", str, "Calibration data; default: taken out of train.", "SOURCE"),
        Flag("--text-column", "data.text_columns", list[str], "Column of the texts; twice for pairs.", "NAME"),
        Flag("--image-column", "data.image_column", str, "Column of the images or their paths.", "NAME"),
        Flag("--label-column", "data.label_column", str, "Column of the labels.", "NAME"),
        Flag("--max-length", "data.max_length", int, "Tokens per text; default: 95th percentile of train, rounded up to 8.", "N"),
        Flag("--task", "task", str, "What the labels are: classification, regression.", "NAME"),
        Flag("--metric", "metric", str, "accuracy, f1, auc, …; default: the task's first.", "NAME"),
    ),
    "Device": (
        Flag("--device", "device", list[str], "Device to compile for; given again: one search for several.", "NAME[:BACKEND[:THREADS]]"),
        Flag("--backend", "backend", str, "Runtime; default: the device's first; auto: built with all, the fastest kept.", "NAME"),
        Flag("--threads", "threads", int, "Threads of one engine.", "N"),
        Flag("--tables", "tables", str, "Folder of latency tables looked into first, or the one table to use.", "FOLDER|FILE"),
        Flag("--allow-foreign", "allow_foreign", bool, "Use the table that --tables names although it was taken in another environment."),
    ),
    "Budgets (one at least, but for microcontrollers)": (
        Flag("--max-drop", "budgets.max_drop", float, "Points of the metric an engine may lose against the baseline.", "POINTS"),
        Flag("--latency-ms", "budgets.latency_ms", list[str], "Milliseconds per call; once per device of several.", "[DEVICE=]MS"),
        Flag("--size-mb", "budgets.size_mb", float, "Megabytes of the graph file; of a microcontroller, flash.", "MB"),
        Flag("--macs-m", "budgets.macs_m", float, "Millions of multiply-accumulates per call.", "M"),
        Flag("--memory-mb", "budgets.memory_mb", float, "Megabytes of weights and activations, counted; of a microcontroller, RAM.", "MB"),
    ),
    "Training": (
        Flag("--epochs", "finetune.epochs", int, "Epochs of the super-network.", "N"),
        Flag("--teacher-epochs", "finetune.teacher_epochs", int, "Epochs of plain fine-tuning before it.", "N"),
        Flag("--batch-size", "finetune.batch_size", int, "Samples a step.", "N"),
        Flag("--learning-rate", "finetune.learning_rate", float, "Peak of AdamW; default: from the hidden size.", "RATE"),
        Flag("--class-weights/--no-class-weights", "finetune.class_weights", bool, "Weigh the loss by inverse class frequency."),
        Flag("--time", "minutes", float, "Wall-clock limit for the run, shared out over the stages.", "30m"),
        Flag("--seed", "seed", int, "Of everything drawn at random.", "N"),
    ),
    "Search": (
        Flag("--searcher", "search.searcher", str, "ehvi, nsga2, linas, mip, …", "NAME"),
        Flag("--objective", "search.objectives", list[str], "Beside error, 3 at most: latency-ms, size-mb, macs-m, memory-mb, …", "NAME"),
        Flag(
            "--space-evolution/--no-space-evolution", "search.space_evolution", bool,
            "Search a part of the space, which moves to where candidates are good and within the budgets.",
        ),
        Flag("--evaluations", "search.evaluations", int, "Candidates scored at most.", "N"),
        Flag("--patience", "search.patience", int, "Batches without a better hypervolume after which the search ends.", "N"),
        Flag("--workers", "search.workers", int, "Processes that score; default: one a core where it takes long.", "N"),
        Flag("--ray", "search.ray", str, "Score on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT.", "ADDRESS"),
        Flag("--top-k", "measure.top_k", int, "Candidates built and measured.", "N"),
        Flag("--tune-session/--no-tune-session", "measure.tune_session", bool, "Choose every engine's session settings by timing them."),
    ),
}
"""Help panel ▸ flags."""

Out = Annotated[Path | None, typer.Option("--out", help="Run folder.", metavar="runs/NAME", show_default="runs/<model name>")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
OfFront = Annotated[int | None, typer.Option("--candidate", help="Number of a candidate of the finished front.", metavar="N")]
RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="TOML file of settings; flags override it.", show_default=False)]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one more parameter per flag; it gets the given ones as `given`: setting ▸ value."""
    flags = [(flag, panel) for panel, group in FLAGS.items() for flag in group]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        found = {flag.setting: values.pop(flag.parameter) for flag, _ in flags}
        command(**values, given=_by_device({setting: value for setting, value in found.items() if value is not None and value != []}))

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *(flag.option(panel) for flag, panel in flags)]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _by_device(given: dict[str, Any]) -> dict[str, Any]:
    """The given settings with flags that may be repeated taken apart: devices, latencies by device, objectives beside error."""
    if devices := given.get("device"):
        first = re.fullmatch(r"([^:]+)(?::([^:]*))?(?::([1-9]\d*)?)?", devices[0])
        if first is None:
            raise typer.BadParameter(f"not a device: {devices[0]} (NAME[:BACKEND[:THREADS]])")
        for setting, value in (("backend", first[2]), ("threads", first[3] and int(first[3]))):
            if value and given.setdefault(setting, value) != value:
                raise typer.BadParameter(f"--device {devices[0]} and --{setting} {given[setting]} exclude each other")
        given["device"] = first[1]
        if len(devices) > 1:
            given["also"] = devices[1:]
    if texts := given.get("budgets.latency_ms"):
        bounds: dict[str, float] = {}
        for text in texts:
            name, _, number = text.rpartition("=")
            if name in bounds or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
                raise typer.BadParameter(f"not a latency budget: {text} ([DEVICE=]MS, once per device)")
            bounds[name] = float(number)
        own = bounds.pop("", None)
        given["budgets.latency_ms"] = own if not bounds else bounds if own is None else {"": own, **bounds}
    if names := given.get("search.objectives"):
        names = [name.replace("-", "_") for name in names]
        given["search.objectives"] = names if "error" in names else ["error", *names]
    return given


# ---------------------------------------------------------------------------------------------- the pipeline


@app.command()
@with_settings
def run(
    given: Mapping[str, Any],
    recipe: RecipeFile = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say steps, minutes and disk space; do nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline, or go on with it; without arguments on the embedded demo."""
    chosen, folder = recipe_and_folder(recipe, out, given)
    if dry_run:
        return _print_plan(chosen, folder, as_json)
    if not _run(chosen, folder, "report", quiet):
        return None
    if as_json:
        from nascompile import report

        return _print_json(report.summary(folder))
    _print_closing(folder)


def _stage_command(stage: str) -> Callable[..., None]:
    @with_settings
    def command(given: Mapping[str, Any], recipe: RecipeFile = None, out: Out = None, as_json: Json = False, quiet: Quiet = False) -> None:
        chosen, folder = recipe_and_folder(recipe, out, given)
        if _run(chosen, folder, stage, quiet):
            _print_stage(folder, stage, as_json)

    return command


@with_settings
def profile(
    given: Mapping[str, Any],
    recipe: RecipeFile = None,
    add_missing: Annotated[
        bool, typer.Option("--add-missing", help="Only add operators to the stored table; none of this environment: an error.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make a new table although there is one; later runs find the new one.")] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find a table of the operators of the model's search space, or time them."""
    if add_missing and fresh:
        raise typer.BadParameter("--add-missing and --fresh exclude each other")
    chosen, folder = recipe_and_folder(recipe, out, given)
    if _run(chosen, folder, "profile", quiet, "fresh" if fresh else "add-missing" if add_missing else ""):
        _print_stage(folder, "profile", as_json)


@with_settings
def finetune(
    given: Mapping[str, Any],
    recipe: RecipeFile = None,
    candidate: OfFront = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what is searched, or a candidate of a finished front by itself; RECIPE may be the run folder."""
    recipe, out = _run_folder(recipe, out)
    chosen, folder = recipe_and_folder(recipe, out, given)
    if candidate is None:
        return _print_stage(folder, "finetune", as_json) if _run(chosen, folder, "finetune", quiet) else None
    if recipe or given:
        raise RecipeError("--candidate takes its settings from the run", hint=f"nascompile finetune --out {folder} --candidate {candidate}")
    from nascompile import beside

    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        weights = beside.train_candidate(folder, candidate, progress)
    if as_json:
        return _print_json({"run": str(folder), "candidate": candidate, "weights": str(weights)})
    typer.echo(weights)


@with_settings
def build(
    given: Mapping[str, Any],
    recipe: RecipeFile = None,
    candidate: OfFront = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of that candidate: as-searched, fp16, int8, …, as the device has it.", metavar="NAME")
    ] = "as-searched",
    keep_intermediate: Annotated[
        bool, typer.Option("--keep-intermediate", help="Keep the graph after each pass beside the engine, and say what each pass changed.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the front's best candidates, or one more of a finished front; RECIPE may be the run folder."""
    recipe, out = _run_folder(recipe, out)
    about = {"device", "backend", "measure.tune_session", *(["threads"] if "device" in given else [])}
    of_run = {name: value for name, value in given.items() if candidate is None or out is None or name not in about}
    chosen, folder = recipe_and_folder(recipe, out, of_run)
    if candidate is None and precision != "as-searched":
        raise RecipeError(f"--precision {precision} is for one --candidate", hint="a run's precisions are searched")
    if candidate is None:
        if not _run(chosen, folder, "build", quiet):
            return None
        if keep_intermediate:
            from nascompile import records

            done = records.load(folder / "stages" / "build.json", records.StageDone)
            return _print_passes(folder, [(folder / name).parent for name, _ in done.files], as_json, quiet)
        return _print_stage(folder, "build", as_json)
    if recipe or given.keys() - about:
        raise RecipeError(
            "--candidate takes its settings from the run, all but --device and --backend and --tune-session",
            hint=f"nascompile build --out {folder} --candidate {candidate}",
        )
    from nascompile import beside, engine as engines

    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        engine = beside.build_candidate(
            folder, candidate, progress, backend=given.get("backend", ""), precision=precision,
            device=given["device"] + (f"::{given['threads']}" if "threads" in given else "") if "device" in given else "",
            tune_session=given.get("measure.tune_session"),
        )  # fmt: skip
    if keep_intermediate:
        return _print_passes(folder, [engine], as_json, quiet)
    if as_json:
        executed = engines.read_manifest(engine).executed
        return _print_json({"run": str(folder), "candidate": candidate, "engine": str(engine), "executed": executed})
    typer.echo(engine)


def _print_passes(out: Path, engines: Sequence[Path], as_json: bool, quiet: bool) -> None:
    """What each pass did to each engine's graph."""
    import msgspec

    from nascompile import beside

    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        found = {engine: beside.check_passes(engine, progress) for engine in engines}
    if as_json:
        return _print_json(
            {"run": str(out), "engines": [{"engine": str(e), "passes": msgspec.to_builtins(checks)} for e, checks in found.items()]}
        )
    for engine, checks in found.items():
        typer.echo(engine)
        rows = [
            (
                f"{c.nodes[0]} > {c.nodes[1]}", f"{c.max_abs:.2g}", "" if c.sqnr_db is None else f"{c.sqnr_db:.1f}",
                "rounds" if c.accepted is None else f"exact, up to {c.accepted:.2g}", c.name,
            )
            for c in checks
        ]  # fmt: skip
        _print_columns(("nodes", "change", "SQNR dB", "kind", "pass"), rows, right=3)


@with_settings
def search(
    given: Mapping[str, Any],
    recipe: RecipeFile = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what each gene matters for accuracy and latency, and which layers can be thinned.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search; with --explain, say what was learned."""
    chosen, folder = recipe_and_folder(recipe, out, given)
    if not _run(chosen, folder, "search", quiet):
        return None
    if not explain:
        return _print_stage(folder, "search", as_json)
    import msgspec

    from nascompile import beside, explain as explaining

    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        found = beside.explain_search(folder, progress)
    if as_json:
        return _print_json({"run": str(folder), **msgspec.to_builtins(found)})
    for line in explaining.lines(found):
        typer.echo(line)
    typer.echo("the run's report has it as a chart when it is next written", err=True)


OWN = {"profile": profile, "finetune": finetune, "search": search, "build": build}
"""Stages whose commands have more than the settings."""
for _stage, _help in STAGES.items():
    app.command(_stage, help=_help)(OWN.get(_stage) or _stage_command(_stage))


def _run_folder(recipe: Path | None, out: Path | None) -> tuple[Path | None, Path | None]:
    """(recipe file, run folder), where the former may be given as the latter."""
    return (None, out or recipe) if recipe is not None and recipe.is_dir() else (recipe, out)


def recipe_and_folder(path: Path | None, out: Path | None, given: Mapping[str, Any]) -> tuple[Recipe, Path]:
    """What to run and where: flags over the recipe file, else over the run folder's own recipe, else over the defaults."""
    from nascompile import records, settings

    stored = out / "recipe.json" if out else None
    if path:
        recipe = settings.from_toml(path, given)
    elif stored and stored.exists() and "model" not in given:
        recipe = settings.replace(records.load(stored, settings.Recipe), given)
    else:
        recipe = settings.replace(_defaults(given), given)
    return recipe, out or Path("runs") / Path(recipe.model).name


def _defaults(given: Mapping[str, Any]) -> Recipe:
    """The embedded model's recipe where one is meant (its own budget only if none is given), else the plain defaults."""
    import msgspec

    from nascompile import settings

    model = given.get("model", settings.TOY if given.get("device") == "fake" else settings.DEMO)
    embedded = {settings.DEMO: settings.demo_recipe, settings.TOY: settings.toy_recipe, settings.MCU_VIT: settings.mcu_vit_recipe}
    recipe = embedded[model]() if model in embedded else settings.Recipe(model=model)
    if "data.data" in given and model != settings.MCU_VIT:  # whose settings are for any data
        recipe = settings.Recipe(model=model)
    if any(setting.startswith("budgets.") for setting in given):
        recipe = msgspec.structs.replace(recipe, budgets=settings.Budgets())
    return recipe


def _run(recipe: Recipe, out: Path, until: str, quiet: bool, table: TableUse = "") -> bool:
    """Whether this process has results to print: of several, the first one does."""
    from nascompile import pipeline, processes

    leads = processes.join().leads
    with _progress(quiet or not leads) as progress, redirect_stdout(sys.stderr):  # stdout is ours: libraries may print
        pipeline.run(recipe, out, until=until, progress=progress, table=table)
    return leads


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from nascompile.progress import Lines, Silent

    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        from nascompile.terminal import Bars

        with Bars() as bars:
            yield bars


def _print_plan(recipe: Recipe, out: Path, as_json: bool) -> None:
    import msgspec

    from nascompile import pipeline

    rows = pipeline.plan(recipe, out)
    left = [row for row in rows if not row["done"]]
    known = {unit: [row[unit] for row in left if row[unit] is not None] for unit in ("minutes", "disk_mb")}
    total = {unit: sum(values) if values or not left else None for unit, values in known.items()}
    if as_json:
        return _print_json({"run": str(out), "recipe": msgspec.to_builtins(recipe), "stages": rows, **total})
    cells = [
        (row["stage"], row["what"], *(("done", "") if row["done"] else (_number(row["minutes"]), _number(row["disk_mb"])))) for row in rows
    ]
    _print_columns(("stage", "what", "minutes", "disk MB"), [*cells, ("", f"to do, in {out}", *(_number(t) for t in total.values()))])


def _print_stage(out: Path, stage: str, as_json: bool) -> None:
    from nascompile import records

    done = records.load(out / "stages" / f"{stage}.json", records.StageDone)
    files = [str(out / name) for name, _ in done.files]
    if as_json:
        return _print_json({"run": str(out), "stage": stage, "seconds": done.seconds, "files": files})
    if stage == "report":
        return _print_closing(out)
    for name in files:
        typer.echo(name)
    if stage == "search":
        from nascompile import report

        for line in report.device_lines(out):
            typer.echo(line, err=True)


def _print_closing(out: Path) -> None:
    """The closing table, then where engine and report are."""
    from rich.console import Console

    from nascompile import report

    # a pipe has no width of its own; 80 columns would break the rows
    Console(width=None if sys.stdout.isatty() else 160).print(report.closing_table(out))
    for line in (*report.variant_lines(out), *report.device_lines(out)):
        typer.echo(line)
    if engine := report.summary(out).get("engine"):
        typer.echo(f"engine: {engine}")
    typer.echo(f"report: {out / 'report.html'}")


# ---------------------------------------------------------------------------------------------- devices and tables


@app.command()
def devices(
    init: Annotated[str, typer.Option("--init", help="Write a profile of this machine under this name.", metavar="NAME")] = "",
    profiles: Annotated[Path | None, typer.Option("--profiles", help="Folder of profiles looked into first.", metavar="FOLDER")] = None,
    as_json: Json = False,
) -> None:
    """List known devices, what can run here, and why the rest cannot."""
    from dataclasses import asdict

    from nascompile import targets

    if init:
        path = targets.init_profile(init, profiles)
        return _print_json({"profile": str(path)}) if as_json else typer.echo(path)
    known = targets.known(profiles)
    if as_json:
        return _print_json([asdict(device) for device in known])
    rows = [(d.name, d.kind, ", ".join(d.backends), "yes" if d.runs_here else "no", d.reason) for d in known]
    _print_columns(("device", "kind", "backends", "runs here", ""), rows)


TableFile = Annotated[Path, typer.Argument(metavar="TABLE", help="A latency table (JSON).")]


CsvFlag = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]


@tables.command()
def show(
    table: Annotated[Path | None, typer.Argument(metavar="TABLE", help="A latency table; none: list all.", show_default=False)] = None,
    folder: Annotated[Path | None, typer.Option("--tables", help="Folder of tables looked into first.", metavar="FOLDER")] = None,
    as_json: Json = False,
    as_csv: CsvFlag = False,
) -> None:
    """Print a table's target, error, environment and rows by kind of operator; without TABLE, list the tables there are."""
    if table is None:
        return _list_tables(folder, as_json)
    import msgspec

    from nascompile import table_view

    found = _table(table)
    if as_json:
        return _print_json(msgspec.to_builtins(found))
    if as_csv:
        return typer.echo(table_view.csv_text(table_view.rows_of(found)), nl=False)
    for line in table_view.headline(found):
        typer.echo(line)
    typer.echo()
    _print_rich(table_view.by_kind(found))


@tables.command()
def validate(
    table: TableFile,
    canary: Annotated[bool, typer.Option("--canary", help="Time a few of its operators again, here; with --model or --run.")] = False,
    model: Annotated[str, typer.Option("--model", help="For --canary: the model whose operators these are.", metavar="ID|FOLDER")] = "",
    run_folder: Annotated[Path | None, typer.Option("--run", help="For --canary: a run of that model.", metavar="RUN")] = None,
    as_json: Json = False,
) -> None:
    """Check that a table is sound and belongs to this machine and these versions; with --canary, that the machine is as fast as it was."""
    from nascompile import latency_table, several, table_check, targets

    found = _table(table)
    if (bool(model) + bool(run_folder)) != canary:
        raise RecipeError(
            "--canary takes one of --model and --run, and they are for nothing else: a table holds shapes, not the graphs to time",
            hint=f"nascompile table validate {table} --canary --model ID|FOLDER",
        )
    table_check.check(found)
    away = bool(targets.load_profile(found.target.device).transport)
    if away or canary:
        from nascompile import beside
    environment = beside.environment_there(found.target) if away else several.environment_of(found.target)
    latency_table.check_environment(found, environment)
    ratio = None
    if canary:
        with redirect_stdout(sys.stderr):
            ratio = beside.canary(found, model, run_folder)
    noisy = sum(row.noisy for row in found.rows)
    if as_json:
        facts = {"rows": len(found.rows), "noisy": noisy, "networks": len(found.validation), "relative_error": found.relative_error,
                 "absolute_error_ms": found.absolute_error_ms}
        return _print_json({"table": str(table), "valid": True, **facts, "canary": ratio})
    typer.echo(f"{table}: sound, and of this environment")
    typer.echo(f"{len(found.rows)} rows ({noisy} noisy), {latency_table.error_text(found)} over {len(found.validation)} networks")
    if ratio is not None:
        typer.echo(f"canary: operators take {ratio:.3f} times what the table says (median)")


@tables.command()
def diff(
    a: TableFile,
    b: TableFile,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a page with the ratios as a chart.", metavar="FILE.html")] = None,
    as_json: Json = False,
    as_csv: CsvFlag = False,
) -> None:
    """Compare two tables: what differs in target and environment, then b / a by kind and precision, then operator by operator."""
    from nascompile import table_view

    found = table_view.compare(_table(a), _table(b))
    if plot is not None:
        table_view.plot(found, a.name, b.name, plot)
        typer.echo(f"chart: {plot}", err=True)
    if as_json:
        return _print_json(table_view.difference_facts(found, str(a), str(b)))
    if as_csv:
        return typer.echo(table_view.csv_text(table_view.difference_rows(found)), nl=False)
    typer.echo(f"a: {a}\nb: {b}\n")
    _print_rich(table_view.difference_tables(found))


@tables.command()
def merge(
    a: TableFile,
    b: TableFile,
    folder: Annotated[Path | None, typer.Option("--tables", help="Folder to write to.", metavar="FOLDER")] = None,
    as_json: Json = False,
) -> None:
    """Write a new table with the rows of both, the quieter one where both have it; print its path."""
    from nascompile import latency_table

    path = latency_table.store(latency_table.merge(_table(a), _table(b)), folder)
    return _print_json({"table": str(path)}) if as_json else typer.echo(path)


@tables.command()
def export(
    table: TableFile,
    out: Annotated[Path | None, typer.Option("--out", help="File to write: .csv, .parquet or .json.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Print the rows as CSV; with --json, as JSON; with --out, write them to a file of the format that its name says."""
    from nascompile import table_view

    rows = table_view.rows_of(_table(table))
    if out is not None:
        table_view.write(rows, out)
        return _print_json({"file": str(out), "rows": len(rows)}) if as_json else typer.echo(out)
    return _print_json(rows) if as_json else typer.echo(table_view.csv_text(rows), nl=False)


def _table(path: Path) -> Any:
    from nascompile import latency_table

    return latency_table.read(path)


def _list_tables(folder: Path | None, as_json: bool) -> None:
    from nascompile import places

    paths = [path for place in places.folders(places.TABLES, folder) for path in sorted(place.glob("*/*.json"))]
    if as_json:
        return _print_json([str(path) for path in paths])
    if not paths:
        typer.echo("no latency table yet; `nascompile profile` makes one", err=True)
    for path in paths:
        typer.echo(path)


def _print_rich(tables: Sequence[Any]) -> None:
    """Tables for a person, at most so many columns wide where stdout has no width of its own."""
    from rich.console import Console

    from nascompile.table_view import COLUMNS

    console = Console(width=None if sys.stdout.isatty() else COLUMNS)
    for table in tables:
        console.print(table)


# ---------------------------------------------------------------------------------------------- kits


@kits.command("export")
def kit_export(
    out: Annotated[Path, typer.Option("--out", help="Folder or .zip file to write; not there yet.", metavar="FOLDER|ZIP")],
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder whose model and data are meant.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Without RUN: model, as for `nascompile run`.", metavar="ID|FOLDER")] = "",
    device: Annotated[
        list[str] | None, typer.Option(
            "--device", metavar="NAME[:BACKEND[:THREADS]]", show_default="cpu",
            help="Device the kit is for; it has a profile. Given again: devices that are searched for together with it.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="onnxruntime or openvino; default: the device's first.", metavar="NAME")] = "",
    provider: Annotated[str, typer.Option("--provider", help="Of onnxruntime: cpu, cuda, tensorrt.", metavar="NAME")] = "cpu",
    processor: Annotated[
        str, typer.Option("--processor", help="Integer products for: any, vnni, arm, here.", metavar="KIND", show_default="any")
    ] = "",
    threads: Annotated[int | None, typer.Option("--threads", help="Threads of one engine.", metavar="N", show_default="1")] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Without RUN: tokens per text.", metavar="N", show_default=False)] = 0,
    labels: Annotated[int, typer.Option("--labels", help="Without RUN: labels of a new head.", metavar="N", show_default=False)] = 0,
    networks: Annotated[
        int | None, typer.Option("--networks", help="Whole networks that calibrate and validate.", metavar="N", show_default="as a profile")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Timing in all; 0: 0.4 an operator.", metavar="S")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything drawn at random.", metavar="N", show_default="0")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write graphs of every operator and a script that times them with NumPy and the runtime alone."""
    import msgspec

    from nascompile import beside, kit, kit_limits, profiler, records, settings, several, targets

    if (run is None) == (not model):
        raise RecipeError("a kit is for one model: name a run folder or a --model", hint="nascompile kit export --model ID --out FOLDER")
    networks = profiler.NETWORKS if networks is None else networks
    faults = [f"--{name} {value}" for name, value in (("networks", networks), ("max-length", max_length), ("labels", labels)) if value < 0]
    faults += [f"--threads {threads}"] * (threads is not None and threads < 1)
    faults += [f"--seconds {seconds}"] * (not 0 <= seconds < 1e6)
    faults += [f"--networks {networks}"] * (networks == 0 or networks > kit_limits.NETWORKS)
    if faults:
        raise RecipeError(f"out of range: {', '.join(faults)}", hint="nascompile kit export --help")
    recipe = records.load(run / "recipe.json", settings.Recipe) if run else _defaults({"model": model})
    flags = {"device": device or ["cpu"], "backend": backend, "threads": threads}
    named = _by_device({name: value for name, value in flags.items() if value})
    meant = targets.Named(named["device"], named.get("backend", ""), named.get("threads", 0))
    also = tuple(named.get("also", ()))
    if run and not also and provider == "cpu" and (found := several.others(recipe, meant)):  # one of the run's devices
        meant, also = targets.Named(found[0].device, found[0].backend, found[0].threads), found[1]
    elif not also:
        meant = replace(meant, threads=meant.threads or recipe.threads)
    if also and provider != "cpu":
        raise RecipeError(f"a search takes no table by {provider}, so none with {', '.join(also)}", hint="name the kit's device alone")
    changed = {"device": meant.device, "backend": meant.backend, "also": also, "seed": recipe.seed if seed is None else seed}
    recipe = msgspec.structs.replace(recipe, **({"model": model} if model else {}), **changed)
    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        made = beside.export_kit(
            recipe, run, out, progress, provider=kit.provider(provider), processor=processor, threads=meant.threads,
            max_length=max_length, labels=labels, seconds=seconds, networks=networks,
        )  # fmt: skip
    stored = sum(size for _, _, size in made.files)
    facts = {"rows": made.rows, "graphs": len(made.graphs), "bytes": stored, "seconds": sum(w.seconds for w in made.windows)}
    if as_json:
        return _print_json({"kit": str(out), **facts, "integers": made.integers})
    typer.echo(f"{out}: {made.rows} operators, {len(made.graphs)} graphs, {stored / 1e6:.1f} MB, about {facts['seconds']:.0f} s of timing")
    unpack = f"unpack {out.name}, then " if out.suffix == ".zip" else ""
    typer.echo(f"on {made.target.device}: {unpack}python3 run_kit.py (needs {' and '.join(made.packages)})", err=True)


@kits.command("import")
def kit_import(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results.json, or the folder or .zip file it is in.")],
    kit: Annotated[
        Path | None, typer.Option("--kit", help="The kit as it was exported; default: beside the results.", metavar="FOLDER|ZIP")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--tables", help="Folder to write to.", metavar="FOLDER")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check what came back from a device and make its latency table; print the path."""
    from nascompile import beside, latency_table

    with _progress(quiet) as progress, redirect_stdout(sys.stderr):
        path, table = beside.import_kit(results, kit, folder, progress)
    noisy = sum(row.noisy for row in table.rows)
    if as_json:
        return _print_json({"table": str(path), "rows": len(table.rows), "noisy": noisy, "relative_error": table.relative_error,
                            "absolute_error_ms": table.absolute_error_ms})
    typer.echo(path)
    emulated = "; EMULATED: these times are not real" if dict(table.environment.must_match).get("emulated") else ""
    typer.echo(f"{len(table.rows)} rows ({noisy} noisy), 90 % interval {latency_table.error_text(table)}{emulated}", err=True)
    return None


# ---------------------------------------------------------------------------------------------- engines


EngineFolder = Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")]


@app.command()
def verify(engine: EngineFolder, as_json: Json = False) -> None:
    """Check the SHA-256 of every file and run the reference sample."""
    from nascompile import engine as engines

    checks = engines.verify(engine)
    if as_json:
        return _print_json({"engine": str(engine), "checks": [check._asdict() for check in checks]})
    _print_columns(("checked", "found"), checks)


@app.command()
def predict(
    engine: EngineFolder,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Texts or image files; @FILE for one a line.")],
    as_json: Json = False,
) -> None:
    """Print the label of every input, one a line; needs no torch."""
    from nascompile import engine as engines, latency_table

    samples = [sample for text in inputs for sample in (_lines(Path(text[1:])) if text.startswith("@") else [text])]
    loaded = engines.load(engine)
    if loaded.manifest.foreign:
        found_by = "; ".join(latency_table.difference_lines(loaded.manifest.foreign))
        typer.echo(f"note: this engine was found by {latency_table.FOREIGN}: {found_by}", err=True)
    found = loaded.predict(samples)
    if as_json:
        rows = [{"label": label, "probability": number} if label else {"value": number} for label, number in found]
        return _print_json([{"input": sample, **row} for sample, row in zip(samples, rows, strict=True)])
    for label, number in found:
        typer.echo(label or number)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the inputs: {path}", detail=str(error)) from error


# ---------------------------------------------------------------------------------------------- printing


def _print_json(body: Any) -> None:
    typer.echo(json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False))


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _print_columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> None:
    """Aligned columns, the first `right` ones to the right; plain text, so that a pipe gets the same."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [cell.rjust(width) if i < right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        typer.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
