"""The command line: parse, call, print. JAX is imported only once there is something to compute."""

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import jaxsim
from jaxsim.commands import (
    CheckLoss,
    Doctor,
    Evaluate,
    Figures,
    Merge,
    Native,
    Plan,
    Run,
    Solve,
    Status,
    Verify,
    imported,
    options_of,
)
from jaxsim.runs.config import DEFAULT_BETAS, RunConfig, load

if TYPE_CHECKING:
    from jaxsim.runs.directory import RunDirectory
    from jaxsim.runs.job import Report, Results
    from jaxsim.runs.share import Share

BAD_INPUT = 2
INTERRUPTED = 130


class _Interrupted(Exception):
    """The user interrupted a run that can go on: one sentence."""


class _InputError(Exception):
    """Something the user gave is not as it should be: one sentence, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"prefshift {jaxsim.__version__}")
        return 0
    try:
        command = _parse(argv)
        return _DO[type(command)](command, argv)
    except _InputError as error:
        print(f"jaxsim: {error}", file=sys.stderr)
        return BAD_INPUT
    except _Interrupted as stop:
        print(f"jaxsim: {stop}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("jaxsim: interrupted; what was begun has no COMPLETE.json", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; that is not an error of ours
        return 0


@contextmanager
def _user_input() -> Iterator[None]:
    """Turn the errors of whatever checks what the user gave into one sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        raise _InputError(text.replace("\n", " ")) from None


def _parse(argv: list[str]) -> Any:
    configured: dict[str, Any] = {"run": Run(), "solve": Solve(), "plan": Plan()}
    with _user_input():
        if argv and argv[0] in configured and len(argv) > 1 and not argv[1].startswith("-"):
            path = Path(argv[1])
            if not path.is_file():
                raise FileNotFoundError(2, "there is no such configuration file", str(path))
            command = configured[argv[0]]
            settings = load(path, type(command.settings))
            configured[argv[0]] = replace(command, config=path, settings=settings)
        commands = (
            Annotated[Run, tyro.conf.subcommand("run", default=configured["run"])]
            | Annotated[Solve, tyro.conf.subcommand("solve", default=configured["solve"])]
            | Annotated[Plan, tyro.conf.subcommand("plan", default=configured["plan"])]
            | Annotated[Merge, tyro.conf.subcommand("merge")]
            | Annotated[Status, tyro.conf.subcommand("status")]
            | Annotated[Verify, tyro.conf.subcommand("verify")]
            | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[Figures, tyro.conf.subcommand("figures")]
            | Annotated[Doctor, tyro.conf.subcommand("doctor")]
            | Annotated[Native, tyro.conf.subcommand("native")]
            | Annotated[CheckLoss, tyro.conf.subcommand("check-loss")]
        )
        with _plain_value_errors():
            command = tyro.cli(
                commands,
                prog="jaxsim",
                args=argv or ["--help"],
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
                description="Exact, vectorised simulation of what preference tuning does to an "
                "output distribution.",
            )
        given = getattr(command, "config", None)
        if given != getattr(configured.get(argv[0] if argv else ""), "config", None):
            raise ValueError(f"{given}: the configuration file comes right after '{argv[0]}'")
        return command


@contextmanager
def _plain_value_errors() -> Iterator[None]:
    """Show what a setting's own check says, without the box and the internal name around it."""
    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            yield
    except SystemExit:
        text = shown.getvalue()
        if "Error parsing __tyro" in text:
            rows = [line.strip(" │") for line in text.splitlines()[1:]]
            end = next((i for i, row in enumerate(rows) if row.startswith(("─", "╰"))), len(rows))
            raise _InputError(" ".join(rows[:end]).split(": ", 1)[1]) from None
        sys.stderr.write(text)
        raise


def _run(command: Run, argv: list[str]) -> int:
    from jaxsim.runs import manage
    from jaxsim.runs.directory import RunDirectory, refuse_if_used

    config, share = command.settings, None
    if command.distributed:
        code = _with_peers(command, argv)
        if code is not None:
            return code
    with _user_input():
        if command.worker:
            share = _share(command.worker)
        if command.resume is not None:
            if command.out is not None:
                raise ValueError("--resume and --out both name a directory; give one of them")
            place = RunDirectory(command.resume)
            config = manage.settings(place)
            manage.explicit(command.settings, config, command.resume)
            if _nothing_left(place):
                return 0
        elif share or command.distributed:
            if command.out is None:
                raise ValueError("--worker needs --out, the directory that all workers share")
            place = RunDirectory(command.out)
        else:
            place = RunDirectory(_free_directory() if command.out is None else command.out)
            refuse_if_used(place.path)
    return _job(
        config,
        place,
        argv,
        figures=not command.no_figures,
        share=share,
        distributed=command.distributed,
        allow_mixed=command.allow_mixed,
    )


def _nothing_left(place: "RunDirectory") -> bool:
    """Say so where a run is complete; where files of it are damaged, have them written again."""
    if not place.is_complete:
        return False
    if place.hashes() == place.listed():
        print(f"{place.path}: the run is complete; there is nothing left to do")
        return True
    print(
        f"jaxsim: {place.path}: files do not fit COMPLETE.json: writing them again", file=sys.stderr
    )
    place.reopen()
    return False


def _with_peers(command: Run, argv: list[str]) -> int | None:
    """Join the other processes of a run; return an exit code where that is done for this one."""
    target = command.resume or command.out
    with _user_input():
        if command.worker or target is None:
            raise ValueError("--distributed needs --out or --resume, a directory that all share")

        from jaxsim.runs import distributed

        distributed.check(command.coordinator, command.processes, command.process)
    code = distributed.supervise(
        argv,
        "a process of this run has ended, and JAX ended this one; committed shards are kept; go on "
        f"with: jaxsim run --resume {target}",
    )
    if code is None:
        with _user_input(), _leaving(target):
            distributed.join(command.coordinator, command.processes, command.process)
    return code


@contextmanager
def _leaving(path: Path) -> Iterator[None]:
    """End at once, in one sentence, where a peer is lost."""
    from jaxsim.runs.distributed import PeerLost, leave

    try:
        yield
    except PeerLost as lost:
        print(
            f"jaxsim: {lost}; committed shards are kept; go on with: jaxsim run --resume {path}",
            file=sys.stderr,
        )
        leave(1)


def _share(text: str) -> "Share":
    from jaxsim.runs.share import Share

    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise ValueError(f"worker is {text!r}; expected i/n, such as 2/8")
    return Share(number=int(number), of=int(of))


def _merge(command: Merge, argv: list[str]) -> int:
    from jaxsim.runs import manage
    from jaxsim.runs.directory import RunDirectory

    with _user_input():
        place = RunDirectory(command.run)
        config = manage.settings(place)
        if _nothing_left(place):
            return 0
        far = manage.progress(place)
        if far.done < far.shards:
            raise ValueError(
                f"{command.run}: {far.shards - far.done} of {far.shards} shards are not there yet; "
                "start their workers again, or: jaxsim run --resume " + str(command.run)
            )
    return _job(
        config, place, argv, figures=not command.no_figures, allow_mixed=command.allow_mixed
    )


def _status(command: Status, argv: list[str]) -> int:
    from jaxsim.runs import manage
    from jaxsim.runs.directory import RunDirectory

    with _user_input():
        far = manage.progress(RunDirectory(command.run))
    state = "complete" if far.complete else "not complete"
    print(
        f"{command.run}: {state}; {far.done:,} of {far.shards:,} shards, "
        f"{far.instances:,} of {far.total:,} instances"
    )
    for wrong in far.damaged:
        print(f"damaged: {wrong}")
    if not far.complete and far.done == far.shards:
        print(f"finish it with: jaxsim merge {command.run}")
    elif not far.complete:
        print(f"go on with: jaxsim run --resume {command.run}")
    elif far.damaged:
        print(f"write them again with: jaxsim run --resume {command.run}")
    return 0


def _verify(command: Verify, argv: list[str]) -> int:
    from jaxsim.runs import job, manage
    from jaxsim.runs.directory import RunDirectory

    with _user_input():
        if command.sample < 0:
            raise ValueError(f"sample is {command.sample}; expected 0 or more")
        place = RunDirectory(command.run)
        config = manage.settings(place)
        manage.plan_of(place)
    _prepare(config.family.dtype)
    with _user_input():
        found = manage.faults(place, job.open_source(config), command.sample)
    for wrong in found:
        print(f"jaxsim: {command.run}: {wrong}", file=sys.stderr)
    if not found:
        far = manage.progress(place)
        again = min(command.sample, far.done)
        whole = "the hashes of all files" if far.complete else "not complete yet"
        print(
            f"{command.run}: nothing is wrong ({whole}; {far.done:,} shards, of which {again} were "
            "computed again)"
        )
    return 1 if found else 0


def _plan(command: Plan, argv: list[str]) -> int:
    from jaxsim.runs import job, manage

    _prepare(command.settings.family.dtype)
    with _user_input():
        source = job.open_source(command.settings)
    for name, value in manage.estimate(command.settings, source).items():
        print(f"{name:26} {value:,.0f}" if value >= 10 else f"{name:26} {value:.3g}")
    return 0


def _evaluate(command: Evaluate, argv: list[str]) -> int:
    from jaxsim.runs import job
    from jaxsim.runs.directory import RunDirectory, refuse_if_used

    with _user_input():
        family = replace(RunConfig().family, dtype=command.dtype)
        config = RunConfig(
            input=command.file, reward=command.reward, betas=command.beta, family=family, atlas=0
        )
        place = RunDirectory(_free_directory() if command.out is None else command.out)
        refuse_if_used(place.path)
    if not command.beta:
        _prepare(command.dtype)
        with _user_input():
            if not getattr(job.open_source(config), "has_beta", False):
                config = replace(config, betas=DEFAULT_BETAS)
    return _job(config, place, argv, figures=not command.no_figures)


def _solve(command: Solve, argv: list[str]) -> int:
    from jaxsim.runs import directory

    config = command.settings
    with _user_input():
        target = _free_directory() if command.out is None else command.out
        directory.refuse_if_used(target)

    from jaxsim.runs import job, solving

    _prepare(config.family.dtype)
    with _user_input():
        source = job.open_source(config)
        if not config.betas and not getattr(source, "has_beta", True):
            raise ValueError(f"{config.input}: there is no beta in it; give --betas")
        place = directory.RunDirectory.create(target)
    with _reporting() as report, job.attempt(place, ["jaxsim", *argv], []):
        found = solving.compare(config, source, place, report)
        _finish(place, not command.no_figures, report)
    print(solving.markdown(found, by_beta=False))
    print(f"Written to {target}")
    return 0


def _prepare(dtype: str) -> None:
    """Set JAX up: compiled programs are kept, and 64 bits where they are asked for."""
    import jax

    from jaxsim.cache import keep_compiled

    keep_compiled()
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def _finish(place: "RunDirectory", figures: bool, report: "Report") -> None:
    """Draw the figures and write the last file."""
    if figures:
        report.stage("drawing figures", 0)
        from jaxsim.figures import draw_all

        draw_all(place)
    place.complete()


def _job(
    config: RunConfig,
    place: "RunDirectory",
    argv: list[str],
    *,
    figures: bool,
    share: "Share | None" = None,
    distributed: bool = False,
    allow_mixed: bool = False,
) -> int:
    """Compute a run, or a share of its shards, in a directory that may hold some of them."""
    import jax

    from jaxsim.rounding import UNTRUSTED, is_trusted
    from jaxsim.runs import job

    _prepare(config.family.dtype)
    if not is_trusted(jax.devices()[0].platform):
        print(f"jaxsim: {UNTRUSTED}", file=sys.stderr)
    who = f"worker-{share.number}-of-{share.of}" if share else ""
    if distributed:
        who = f"process-{jax.process_index()}-of-{jax.process_count()}"
    with _user_input():
        source = job.open_source(config)
        place.make()
    with ExitStack() as stack:
        with _user_input():
            stack.enter_context(place.locked(who))
            if distributed:
                from jaxsim.runs.distributed import begin, run

                with _leaving(place.path):
                    mixed = begin(config, source, place, allow_mixed=allow_mixed)
            else:
                mixed = job.begin(config, source, place, allow_mixed=allow_mixed)
        report = stack.enter_context(_reporting())
        stack.enter_context(_kept(place.path))
        stack.enter_context(job.attempt(place, ["jaxsim", *argv], mixed))
        results: Results | None = None
        if distributed:
            with _leaving(place.path):
                results = run(config, source, place, report)
        elif share:
            job.compute(config, source, place, share, report)
        else:
            results = job.run(config, source, place, report)
        if results:
            _finish(place, figures, report)
    if results:
        _print_results(results, place.path)
    else:
        print(f"The shards of {who.replace('-', ' ')} are in {place.path}")
    return 0


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Say what is kept, and how to go on, where a run ends early."""
    from jaxsim.runs.job import Stopped

    try:
        yield
    except Stopped as stop:
        raise _Interrupted(f"{stop}; go on with: jaxsim run --resume {path}") from None
    except KeyboardInterrupt:
        raise _Interrupted(
            f"interrupted; committed shards are kept; go on with: jaxsim run --resume {path}"
        ) from None
    except OSError as error:
        raise _InputError(
            f"{error.filename or path}: {error.strerror}; committed shards are kept; "
            f"go on with: jaxsim run --resume {path}"
        ) from None


def _figures(command: Figures, argv: list[str]) -> int:
    from jaxsim.figures import draw_all
    from jaxsim.runs.directory import RunDirectory

    with _user_input():
        place = RunDirectory.open(command.run)
    written = draw_all(place)
    with _user_input():
        place.complete(only="figures/")
    print(f"{len(written)} figures in {command.run / 'figures'}")
    return 0


def _doctor(command: Doctor, argv: list[str]) -> int:
    import jax

    from jaxsim.engine import native
    from jaxsim.rounding import UNTRUSTED, is_trusted
    from jaxsim.runs.job import versions

    for name, version in versions().items():
        print(f"{name:12} {version}")
    for device in jax.devices():
        print(f"{'device':12} {device} ({device.platform})")
    print(f"{'64-bit mode':12} {'on' if jax.config.read('jax_enable_x64') else 'off'}")
    platform = jax.devices()[0].platform
    trusted = "rest on checked functions" if is_trusted(platform) else UNTRUSTED
    print(f"{'verdicts':12} {trusted}")
    kernel = "in use on CPU" if native.load() else "not built (jaxsim native)"
    print(f"{'native':12} {kernel}")
    clash = name_clash()
    if clash:
        print(f"jaxsim: {clash}", file=sys.stderr)
        return 1
    print(f"{'name clash':12} none")
    return _check_functions() if command.functions else 0


def _check_functions() -> int:
    from jaxsim import rounding

    with _reporting() as report:
        report.stage("checking functions", 100, "%")
        errors = rounding.largest_errors(progress=lambda share: report.progress(int(100 * share)))
    print("\nfunction   largest error   assumed   (in 2^-24; quotients: of a sample)")
    for name, bound in rounding.BOUNDS.items():
        print(f"{name:10} {errors[name]:13.3f} {bound:9.0f}")
    if not rounding.passes(errors):
        print("jaxsim: a function is less accurate than verdicts assume", file=sys.stderr)
        return 1
    print(f"passed; recorded in {rounding.record(errors)}")
    return 0


def _native(command: Native, argv: list[str]) -> int:
    from jaxsim.engine import native

    if command.remove:
        print("removed" if native.remove() else "there was none")
        return 0
    with _user_input():
        print(f"built {native.build()}; jaxsim.evaluate uses it on CPU from now on")
    return 0


def _check_loss(command: CheckLoss, argv: list[str]) -> int:
    with _user_input():
        options = options_of(command.option)
        loss = imported(command.loss, allowed=command.allow_import)

        from jaxsim.methods.check import check_loss

        report = check_loss(loss, beta=command.beta, reduction=command.reduction, options=options)
    print(report)
    return 0 if report.passed else 1


def name_clash() -> str | None:
    """Say what is wrong where the other distribution named jaxsim is installed; else None."""
    from importlib import metadata

    try:
        other = metadata.distribution("jaxsim")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"the distribution jaxsim {other.version} (a physics engine) is installed too and shares "
        "the import name; run: pip uninstall jaxsim prefshift, then install prefshift again"
    )


def _free_directory() -> Path:
    parent = Path("jaxsim-runs")
    taken = [int(p.name) for p in parent.glob("*") if p.name.isdigit()] if parent.is_dir() else []
    return parent / str(max(taken, default=0) + 1)


@contextmanager
def _reporting() -> Iterator["Report"]:
    """Show a progress bar on a terminal, and plain lines elsewhere."""
    from jaxsim.progress import bar, lines, remember_interrupts

    remember_interrupts()
    with (bar if sys.stderr.isatty() else lines)() as report:
        yield report


def _print_results(results: "Results", target: Path) -> None:
    from jaxsim.runs.job import claims_markdown

    print(claims_markdown(results.rows))
    print(f"Written to {target}")


_DO: dict[Any, Any] = {
    Run: _run,
    Solve: _solve,
    Plan: _plan,
    Merge: _merge,
    Status: _status,
    Verify: _verify,
    Evaluate: _evaluate,
    Figures: _figures,
    Doctor: _doctor,
    Native: _native,
    CheckLoss: _check_loss,
}
