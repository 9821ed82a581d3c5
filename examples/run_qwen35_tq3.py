"""Chat with a Qwen3.5 model whose attention caches are packed, and see the memory they take.

python examples/run_qwen35_tq3.py                                   # the bundled model, 3 bits
python examples/run_qwen35_tq3.py --model path/to/Qwen3.5-9B-MLX-4bit --prompt "..."
"""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_reduce
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import dequantize_model
from tqdm import tqdm
from turboquant_mlx import TurboQuantKVCache, TurboQuantRotatingKVCache, enable
from turboquant_mlx.overlay.gated_delta import enable_chunked_recurrence

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "models" / "qwen35-tiny-4bit"
PAGE = Path(__file__).resolve().parent / "prompt.md"
FACT = "The secret number for Lisbon is 70342."
QUESTION = "What is the secret number for Lisbon?"
PACKED = (TurboQuantKVCache, TurboQuantRotatingKVCache)
LFS = b"version https://git-lfs"


def planted_prompt():
    """The paragraphs of prompt.md, about 1,000 tokens, with a fact in their middle, and the question."""
    paragraphs = PAGE.read_text().strip().split("\n\n")
    middle = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:middle], FACT, *paragraphs[middle:], QUESTION])


def refuse(message):
    sys.exit(f"[run] {message}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="a local model directory (default: the bundled one)"
    )
    parser.add_argument("--bits", type=int, default=3, choices=(2, 3, 4, 8))
    parser.add_argument("--key-bits", type=int, choices=(2, 3, 4, 8), help="default: --bits")
    parser.add_argument("--value-bits", type=int, choices=(2, 3, 4, 8), help="default: --bits")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="default: a page of text with a fact planted in it")
    prompt.add_argument("--prompt-file", type=Path, help="a text file with the prompt")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the sampler and of the rotation's signs")
    args = parser.parse_args(argv)
    for name, lowest in (("max_tokens", 1), ("seed", 0), ("temp", 0)):
        number = getattr(args, name)
        if not lowest <= number < 2**63:
            refuse(f"--{name.replace('_', '-')} must be at least {lowest} and less than 2^63; got {number}")
    return args


def prompt_text(args):
    """What the user asks, from --prompt, --prompt-file or the page."""
    text = args.prompt
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            refuse(f"--prompt-file {args.prompt_file} cannot be read: {error}")
    if text is None:
        return planted_prompt()
    if not text.strip():
        refuse("the prompt is empty; leave --prompt and --prompt-file out for the page that comes with the example")
    return text


def is_pointer(path):
    """Whether Git LFS left its note in the file's place."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def check_model(path):
    """Refuses a folder that mlx-lm could not load, with what it lacks."""
    if not path.is_dir():
        refuse(f"--model must be a local model directory; there is none at {path}")
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            refuse(f"{path} holds no {name}; --model must be a whole model directory in mlx-lm's format")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        refuse(f"{path} holds no *.safetensors weights; download the model first (see README, Troubleshooting)")
    for file in (path / "config.json", path / "tokenizer.json", *weights):
        if is_pointer(file):
            refuse(f"{file} is a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull` there")


def load_model(path):
    """The model and tokenizer, in float32 on a CPU, where MLX's half-precision and 4-bit products are slow."""
    try:
        model, tokenizer = load(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        refuse(f"{path} cannot be loaded: {error}")
    if mx.default_device() == mx.Device(mx.cpu):
        parameters = sum(v.size for _, v in tree_flatten(model.parameters()))
        if parameters < 200e6:  # small enough to hold as float32, whose products a fast BLAS can do
            model = dequantize_model(model)
        model.set_dtype(mx.float32)
        enable_chunked_recurrence(model)  # mlx-lm reads prompts token by token there
    return model, tokenizer


def state_bytes(cache):
    return tree_reduce(lambda n, x: n + (x.nbytes if isinstance(x, mx.array) else 0), cache.state, 0)


def report(cache, response):
    packed = [c for c in cache if isinstance(c, PACKED)]
    others = [c for c in cache if not isinstance(c, PACKED)]
    notes = [c.inspect() for c in packed]
    resident, equivalent = (sum(n[key] for n in notes) for key in ("resident_bytes", "float16_bytes"))
    tokens, kernel = max(n["tokens"] for n in notes), notes[0]["kernel"]
    mib = 1 / 2**20
    print()
    print(f"prompt   {response.prompt_tokens:6d} tokens  {response.prompt_tps:8.1f} tokens/s")
    print(f"decode   {response.generation_tokens:6d} tokens  {response.generation_tps:8.1f} tokens/s")
    print(f"attention caches, {tokens} tokens, resident   {resident * mib:8.3f} MiB")
    print(f"the same as float16 (computed)         {equivalent * mib:8.3f} MiB   {equivalent / resident:.2f}x")
    print(f"linear-attention state, unchanged      {sum(map(state_bytes, others)) * mib:8.3f} MiB")
    for index, c in enumerate(cache):
        became = f"{type(c).__name__} K{c.key_bits} V{c.value_bits}" if c in packed else f"{type(c).__name__} (kept)"
        print(f"  layer {index:2d}: {became}")
    print(f"attention kernel: {kernel}")


def main(argv=None):
    args = parse(argv)
    text = prompt_text(args)
    check_model(args.model)
    mx.random.seed(args.seed)
    model, tokenizer = load_model(args.model)
    try:
        enable(model, bits=args.bits, key_bits=args.key_bits, value_bits=args.value_bits, seed=args.seed)
    except ValueError as error:
        refuse(error)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)

    cache = model.make_cache()
    bar = tqdm(total=len(prompt), desc="reading the prompt", unit="tok", disable=not sys.stderr.isatty())
    started = time.perf_counter()

    def progress(done, _):
        bar.update(done - bar.n)
        if done == len(prompt):
            bar.close()

    response = None
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        sampler=make_sampler(temp=args.temp),
        prompt_cache=cache,
        prompt_progress_callback=progress,
        prefill_step_size=512,
    ):
        print(response.text, end="", flush=True)
    print()
    report(cache, response)
    print(f"total    {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
