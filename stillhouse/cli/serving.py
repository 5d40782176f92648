"""`stillhouse serve` and `stillhouse chat`."""

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.cli.runs import find_run
from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.pipelines.serving import RunningServer, ServedModel, ServeJob

Port = Annotated[int, typer.Option(min=1, max=65535, help="The port.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="A file with the key; without one a key is generated."),
]


def serve(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model reference.")],
    host: Annotated[
        str, typer.Option(help="Others reach it only if you say so here.")
    ] = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Ask nobody for a key; on loopback alone.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(help="plan, k4v4, …, fp8, bf16; else what a run evaluated, or bf16."),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a request at most; else the model's own.")
    ] = None,
    cache_gib: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Memory of the cache; else, on a CPU, a quarter of what is free."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16, float32; else that of the export, or bfloat16."),
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that requests have when it is told to stop.")
    ] = 30,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked.")] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Compile nothing: it starts sooner, and is slower.")
    ] = False,
) -> None:
    """Serve a student, or any model, behind an OpenAI-compatible API."""
    from stillhouse.pipelines.serving import ServeOptions, ask_server, default_key_file

    if no_api_key and api_key_file is not None:
        raise ConfigError("serve: expected --api-key-file or --no-api-key, found both")
    key_file = None if no_api_key else api_key_file or default_key_file(port)
    options = ServeOptions(
        host, port, key_file, cache, max_context, dtype, cache_gib, drain, log_prompts, eager
    )
    _serve_until_told(ask_server(_served(what), options), key_file)


def _serve_until_told(job: "ServeJob", key_file: Path | None) -> None:
    """From its start to its end, with what a user has to know."""
    from stillhouse.pipelines.serving import start_server

    server = start_server(job)
    print(f"{job.name}: cache {job.cache.format}, log {server.log}", file=sys.stderr)
    with _passing_signals(server):
        server.wait_until_ready(waiting=_dot)
        print(f"\nserving at {job.url}/v1", file=sys.stderr)
        if key_file is not None:
            print(f"key: in {key_file}; try: stillhouse chat --port {job.port}", file=sys.stderr)
        code = server.wait()
    if code:
        print(f"stillhouse: the server ended with {server.complaint()}", file=sys.stderr)
        raise typer.Exit(1)


def deploy(
    name: Annotated[str, typer.Argument(help="A registered model (deploy.model_name).")],
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the champion before champion again.")
    ] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(help="The MLflow server; else the database beside the runs.")
    ] = None,
    runs_root: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs"),
) -> None:
    """Take a promotion back. (A run's last stage deploys: `stillhouse run RECIPE`.)"""
    from stillhouse.pipelines.serving import roll_back_champion

    if not rollback:
        raise ConfigError(
            "deploy: expected --rollback, found nothing to do; a student is deployed by its run: "
            "stillhouse run RECIPE"
        )
    now, before = roll_back_champion(name, tracking_uri, runs_root)
    print(f"{name}: champion is version {before} again, no longer {now}")


def chat(
    port: Port = 8000,
    host: Annotated[str, typer.Option(help="Where the server is.")] = "127.0.0.1",
    api_key_file: KeyFile = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once, and end.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Go on with the text, without a chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to a served model; an empty line or Ctrl-D ends it."""
    from stillhouse.pipelines.chatting import ChatServer
    from stillhouse.pipelines.serving import default_key_file, read_key, server_url

    file = api_key_file or default_key_file(port)
    key = read_key(file) if api_key_file is not None or file.is_file() else None
    server = ChatServer(server_url(host, port), key, temperature)
    model = server.model()
    messages: list[dict[str, str]] = []
    for text in [prompt] if prompt is not None else _typed(model):
        messages.append({"role": "user", "content": text})
        pieces = (
            server.complete(model, text, max_tokens)
            if complete
            else server.chat(model, messages, max_tokens)
        )
        answer = ""
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _typed(model: str) -> Any:
    print(f"{model}; an empty line ends it", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield text


def _served(what: str) -> "ServedModel":
    from stillhouse.pipelines.serving import served_model, served_run

    try:
        folder = find_run(what)
    except ConfigError:
        return served_model(what, lambda text: print(text, file=sys.stderr))
    return served_run(folder)


def _dot(_seconds: float) -> None:
    print(".", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _passing_signals(server: "RunningServer") -> Any:
    """SIGTERM and Ctrl-C let the server finish what is under way; a second one ends it at once."""
    told: list[int] = []

    def pass_on(_number: int, _frame: object) -> None:
        if told:
            server.kill()
            raise SystemExit(1)
        told.append(1)
        print("\nstopping; requests under way are finished", file=sys.stderr)
        server.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except BaseException:
        server.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
