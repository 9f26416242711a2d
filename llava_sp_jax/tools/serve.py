"""llava-sp serve: answers questions over HTTP, by OpenAI's protocol."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from llava_sp_jax import console
from llava_sp_jax.tools import arguments
from llava_sp_jax.tools.arguments import DTYPE, DTYPES, MESH
from llava_sp_jax.tools.convert import source_options, to_options

if TYPE_CHECKING:
  from llava_sp_jax.serve.limits import Limits

KEY = "LLAVA_SP_API_KEY"  # variable of the environment with a key of clients


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp serve",
    description="Answers questions about pictures over HTTP, by OpenAI's protocol: "
    "/v1/chat/completions, /v1/completions, /v1/models, /tokenize, /health, /metrics.",
    epilog="example: llava-sp serve runs/finetune --port 8000",
  )
  result.add_argument(
    "checkpoint", metavar="CHECKPOINT", help="run of train, or any format of llava-sp convert"
  )
  source_options(result)

  place = result.add_argument_group("where")
  place.add_argument("--host", default="127.0.0.1", help="(%(default)s: this machine alone)")
  place.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
  place.add_argument("--root-path", default="", help="path that a proxy puts before ours")
  place.add_argument("--tls-cert", default="", metavar="FILE", help="certificate, PEM: https")
  place.add_argument("--tls-key", default="", metavar="FILE", help="its key, PEM")

  who = result.add_argument_group("who may ask")
  who.add_argument(
    "--api-key",
    action="append",
    default=[],
    metavar="KEY",
    help=f"that clients must send to ask; may be repeated (default: {KEY}, if it is set)",
  )
  who.add_argument(
    "--allow-origin",
    action="append",
    default=[],
    metavar="ORIGIN",
    help="of web pages that may ask, such as https://example.com; *: all (default: none)",
  )
  who.add_argument(
    "--image-host",
    action="append",
    default=[],
    metavar="HOST",
    help="from which pictures are fetched by URL, with :PORT if it has its own (default: none)",
  )
  who.add_argument(
    "--limit",
    action="append",
    default=[],
    metavar="NAME=N",
    help="another limit of requests and connections; docs/serving.md lists them",
  )

  how = result.add_argument_group("answers")
  how.add_argument(
    "--name", action="append", default=[], help="of the model (default: that of its config)"
  )
  how.add_argument("--batch-size", type=int, default=16, help="answers at a time (%(default)s)")
  how.add_argument(
    "--max-positions",
    type=int,
    default=0,
    metavar="N",
    help="of prompt and answer together (default: the model's, or what memory holds)",
  )
  how.add_argument("--mesh", default="", help=MESH)
  how.add_argument("--dtype", default="", choices=DTYPES, help=DTYPE)
  arguments.format_options(how.add_argument)
  how.add_argument(
    "--max-new-tokens", type=int, default=512, help="if a request does not say it (%(default)s)"
  )
  how.add_argument(
    "--temperature", type=float, default=0.0, help="likewise; 0 is greedy (%(default)s)"
  )
  how.add_argument("--top-p", type=float, default=1.0, help="likewise (%(default)s)")

  run = result.add_argument_group("running")
  run.add_argument(
    "--drain", type=float, metavar="SECONDS", help="for running requests at SIGTERM (30)"
  )
  run.add_argument("--access-log", action="store_true", help="log a line for each request")
  return result


def limits_of(given: list[str], drain: float | None) -> Limits:
  """Returns the limits with the values of NAME=N. Raises: ConfigError for an unknown or wrong one."""
  from llava_sp_jax.config import ConfigError, lookup
  from llava_sp_jax.serve.limits import DEFAULT

  values: dict[str, Any] = {} if drain is None else {"stop_seconds": drain}
  known = dataclasses.asdict(DEFAULT)
  for text in given:
    name, _, number = text.partition("=")
    kind = type(lookup("--limit", name, known))
    try:
      values[name] = kind(number)
    except ValueError:
      message = (
        f"--limit {name}: expected a number as in {name}={known[name]}, found {number!r:.40}"
      )
      raise ConfigError(message) from None
  try:
    return dataclasses.replace(DEFAULT, **values)
  except ValueError as error:
    raise ConfigError(f"--limit: {error}") from None


def main(argv: list[str]) -> int:
  """Serves a checkpoint until a signal; returns 0 after it has stopped."""
  options = parser().parse_args(argv)
  if bool(options.tls_cert) != bool(options.tls_key):
    parser().error("--tls-cert and --tls-key: expected both or none")
  if not 0 <= options.port < 1 << 16:
    parser().error(f"--port: expected 0 to 65535, found {options.port}")
  for name in ("batch_size", "max_positions"):
    if (found := getattr(options, name)) < (name == "batch_size"):
      parser().error(f"--{name.replace('_', '-')}: expected at least 1, found {found}")
  from llava_sp_jax.infer.generation import Generation

  try:
    generation = Generation(
      max_new_tokens=options.max_new_tokens,
      temperature=options.temperature,
      top_p=options.top_p,
    )
  except ValueError as error:
    setting, found = str(error).split(":", 1)
    parser().error(f"--{setting.replace('_', '-')}:{found}")
  limits = limits_of(options.limit, options.drain)

  from llava_sp_jax.serve import server

  # Bound here, so that a port in use is reported before a model is loaded.
  with server.listen(options.host, options.port) as socket:
    return _serve(options, generation, limits, socket)


def _serve(options: argparse.Namespace, generation: Any, limits: Limits, socket: Any) -> int:
  from llava_sp_jax.distributed import memory, mesh
  from llava_sp_jax.infer import pretrained
  from llava_sp_jax.infer.engine import Engine
  from llava_sp_jax.infer.service import Service
  from llava_sp_jax.serve import checkpoint, page
  from llava_sp_jax.serve.app import application
  from llava_sp_jax.serve.server import Server
  from llava_sp_jax.serve.state import State

  source = to_options(options, options.checkpoint)
  devices = mesh.local(options.mesh)
  loaded = pretrained.from_any(
    options.checkpoint,
    source,
    dtype=options.dtype,
    weights=options.weights,
    cache=options.cache,
  )
  count = devices.devices.size if devices is not None else 1
  sizes = checkpoint.sizes(
    loaded.config, limits, options.batch_size, options.max_positions, memory.free(count)
  )
  layout = checkpoint.layout(loaded.config, limits, sizes)
  default = checkpoint.shortened(generation, layout)
  engine = Engine(loaded, options.batch_size, default, devices, layout)
  service = Service(engine, waiting=limits.waiting, waiting_tokens=limits.waiting_tokens)
  names = options.name or [loaded.config.name]
  served = checkpoint.served(engine, service, names, options.batch_size)

  host, port = socket.getsockname()[:2]
  scheme, host = "https" if options.tls_cert else "http", f"[{host}]" if ":" in host else host
  root = f"{scheme}://{host}:{port}{options.root_path}/"
  url = f"{root}v1"
  keys = options.api_key or [key for key in [os.environ.get(KEY, "")] if key]
  console.say(f"{options.checkpoint} as {', '.join(names)}: {checkpoint.described(engine)}")
  console.say(f"{memory.described()}; warming up on {url}")

  def warm_up() -> None:
    service.warm_up(checkpoint.examples(loaded.config))
    service.start()

  state = State()
  app = application(
    served,
    state,
    limits,
    keys=keys,
    origins=options.allow_origin,
    hosts=options.image_host,
    pages=page.routes(names[0], loaded.config),
  )
  runner = Server(
    app,
    state,
    limits,
    warm_up=warm_up,
    started=lambda: console.say(
      f"ready: {url} ({'a key is needed' if keys else 'no key is needed'}), page {root}; {memory.described()}"
    ),
    root_path=options.root_path,
    ssl_certfile=options.tls_cert or None,
    ssl_keyfile=options.tls_key or None,
  )
  _log(options.access_log)
  runner.run([socket])
  if state.failure is not None:
    raise state.failure
  console.say("stopped")
  if runner.warming:  # a program is being compiled, which nothing can interrupt
    os._exit(0)
  service.close()
  return 0


def _log(requests: bool) -> None:
  """Writes the server's log to standard error: errors, and with `requests` a line for each."""
  import logging

  log, handler = logging.getLogger("llava_sp_jax.serve"), logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
  log.addHandler(handler)
  log.setLevel(logging.INFO if requests else logging.WARNING)
  log.propagate = False  # other libraries may have set up another form
