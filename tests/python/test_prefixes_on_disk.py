"""Prefixes on disk: found again after a restart, never served when anything about them is wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MODEL, TEXT
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from serving import serving
from small_models import greedy, prompt, small_hybrid, small_llama
from turboquant_mlx import enable
from turboquant_mlx.overlay import disk

ROOM = 10**9


@pytest.fixture
def open_store(tmp_path):
    """Makes stores of one directory, and ends their threads."""
    opened = []

    def make(model, most=ROOM):
        store = disk.PrefixStore(tmp_path / "prefixes", most)
        opened.append(store)
        store.use([model])
        return store

    yield make
    for store in opened:
        store.close()


def filled(model, tokens, step=32):
    cache = make_prompt_cache(model)
    for at in range(0, len(tokens), step):
        model(mx.array([tokens[at : at + step]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


def hybrid():
    model = small_hybrid()
    enable(model, checkpoints=True)
    return model


def files(store):
    return sorted(p for p in store.directory.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("make", [hybrid, small_llama])
def test_a_prefix_is_found_after_a_restart(open_store, make):
    model, tokens = make(), prompt(100)
    enable(model, checkpoints=make is hybrid)
    store = open_store(model)
    store.put(tokens, filled(model, tokens))
    assert store.flush() and len(files(store)) == 1
    again = open_store(model)
    found = again.find([*tokens, 5], 0)
    assert found.tokens == tokens and again.find(tokens[:10], 0) is None and again.find(prompt(50, seed=9), 0) is None
    caches = again.load(found)
    assert greedy(model, [5, 6], 12, caches) == greedy(model, [*tokens, 5, 6], 12)
    # A prompt that leaves the prefix goes on from where its caches can go back to.
    assert again.find([*tokens[:80], 5], 0).reach([*tokens[:80], 5]) == (64 if make is hybrid else 80)


def test_the_servers_prompt_cache_looks_on_disk(open_store):
    model, tokens = hybrid(), prompt(100)
    cache = disk.stored(LRUPromptCache, open_store(model))(10)
    cache.insert_cache("m", tokens, filled(model, tokens))
    assert cache.insert_cache("m", tokens[:5], filled(model, tokens[:5])) is None
    store = open_store(model)
    fresh = disk.stored(LRUPromptCache, store)(10)
    deadline = time.monotonic() + 60
    while not files(store) and time.monotonic() < deadline:
        time.sleep(0.05)
    store.look()
    for _ in range(2):  # from the disk, and then from memory
        caches, rest = fresh.fetch_nearest_cache("m", [*tokens[:96], 1, 2, 3])
        assert rest == [1, 2, 3]
        assert greedy(model, rest, 8, caches) == greedy(model, [*tokens[:96], 1, 2, 3], 8)
    assert len(fresh) == 1


def test_longer_prefixes_take_the_place_of_shorter_ones(open_store):
    model, tokens = hybrid(), prompt(128)
    store = open_store(model)
    for length in (64, 128):
        store.put(tokens[:length], filled(model, tokens[:length]))
        assert store.flush()
    assert [len(p.tokens) for p in store._found.values()] == [128] and len(files(store)) == 1


def test_the_least_recently_used_goes_first(open_store):
    model = small_llama()
    enable(model)
    texts = [prompt(64, seed=i) for i in range(4)]
    store = open_store(model)
    store.put(texts[0], filled(model, texts[0]))
    assert store.flush()
    size = files(store)[0].stat().st_size
    store.most_bytes = int(2.5 * size)
    store.put(texts[1], filled(model, texts[1]))
    assert store.flush()
    for path, age in zip(files(store), (100, 200), strict=True):
        os.utime(path, (time.time() - age,) * 2)
    old = next(p for p in store._found.values() if (store.directory / p.name) == files(store)[1])
    assert store.load(old) is not None, "which makes it the newest"
    store.put(texts[2], filled(model, texts[2]))
    assert store.flush() and len(files(store)) == 2 and old.name in {p.name for p in files(store)}
    assert sum(p.stat().st_size for p in files(store)) <= store.most_bytes


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)


def damage_header(path):
    path.write_bytes(b"nothing of a safetensors file")


def damage_tokens(path):
    """The same length, another prompt."""
    data = path.read_bytes()
    at = data.index(b'tokens\\": [') + len(b'tokens\\": [')
    path.write_bytes(data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :])


@pytest.mark.parametrize("damage", [damage_cut, damage_byte, damage_header, damage_tokens])
def test_damaged_files_are_skipped_with_one_warning(open_store, capfd, damage):
    model, tokens = hybrid(), prompt(100)
    store = open_store(model)
    store.put(tokens, filled(model, tokens))
    assert store.flush()
    damage(files(store)[0])
    again = disk.stored(LRUPromptCache, broken := open_store(model))(10)
    if damage is damage_tokens:  # the header is believed until the file is loaded
        tokens = next(iter(broken._found.values())).tokens
        assert tokens != prompt(100)
    for _ in range(3):
        caches, rest = again.fetch_nearest_cache("m", [*tokens, 5])
        assert caches is None and len(rest) == 101
        broken.look()
    assert capfd.readouterr().err.count("is not used") == 1 and not broken._found


def test_other_models_and_settings_are_foreign(open_store, capfd):
    model, tokens = small_llama(), prompt(100)
    enable(model)
    store = open_store(model)
    store.put(tokens, filled(model, tokens))
    assert store.flush()
    for other, settings in ((small_llama(seed=1), {}), (small_llama(), {"bits": 4}), (small_llama(), {"sink": 8})):
        enable(other, **settings)
        assert open_store(other).find([*tokens, 1], 0) is None
        assert capfd.readouterr().err.count("belongs to another model or to other settings") == 1
    assert open_store(model).find([*tokens, 1], 0) is not None


def test_caches_of_another_start_are_foreign():
    """A cache that packs itself at another token answers otherwise."""
    model, names = small_llama(), set()
    for start in (None, 64, 128):
        enable(model, start=start)
        names.add(disk.identity_of([model]))
    assert len(names) == 3


def test_a_prefix_that_has_no_room_is_said(open_store, capfd):
    model, tokens = small_llama(), prompt(40)
    enable(model)
    store = open_store(model, 1000)
    for _ in range(2):
        store.put(tokens, filled(model, tokens))
        assert store.flush() and not files(store)
    assert capfd.readouterr().err.count("more than the 1,000 of all prefixes") == 1


def test_two_stores_of_one_directory(open_store):
    """Each sees what the other wrote, and neither minds what the other has deleted."""
    model = small_llama()
    enable(model)
    one, two = open_store(model), open_store(model)
    texts = [prompt(64, seed=i) for i in range(6)]
    for i, text in enumerate(texts):
        (one, two)[i % 2].put(text, filled(model, text))
    assert one.flush() and two.flush()
    one.look()
    two.look()
    assert len(one._found) == len(two._found) == 6
    gone = one.find([*texts[0], 1], 0)
    (one.directory / gone.name).unlink()
    assert two.load(gone) is None and two.find([*texts[0], 1], 0) is None


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from test_prefixes_on_disk import filled, hybrid, prompt
from turboquant_mlx.overlay import disk
disk._WAIT = 0.0
model = hybrid()
store = disk.PrefixStore(sys.argv[2], 10**9)
store.use([model])
first = int(sys.argv[3])
caches = [filled(model, prompt(200, seed=first + i)) for i in range(3)]
print("ready", flush=True)
for i in range(1000):
    for path in Path(sys.argv[2]).iterdir():
        path.unlink(missing_ok=True)
    for j, cache in enumerate(caches):
        store.put(prompt(200, seed=first + j), cache)
    store.flush()
"""


def killed_while_writing(directory, model, first, delay):
    """Lets a process write prefixes, kills it after `delay` seconds, and checks what it left.  Returns the files left."""
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, here, str(directory), str(first)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = disk.PrefixStore(directory, ROOM)
    try:
        store.use([model])
        assert not [p for p in directory.iterdir() if p.name.startswith(".")], "a temporary file outlived its process"
        assert not store._warned
        for prefix in list(store._found.values()):
            caches = store.load(prefix)
            assert caches is not None, "a file that has its name is whole"
            assert greedy(model, [5], 3, caches) == greedy(model, [*prefix.tokens, 5], 3, prefill_step_size=32)
        return len(store._found)
    finally:
        store.close()


def test_a_killed_process_leaves_whole_files(tmp_path):
    """The script tests/python/scripts/kills.py does this 200 times."""
    model = hybrid()
    for i, delay in enumerate((0.05, 0.11, 0.2)):
        killed_while_writing(tmp_path, model, 100 * i, delay)


def test_a_servers_restart(tmp_path):
    options = ("--tq-calibration", "none", "--tq-prefix-dir", str(tmp_path), "--tq-prefix-bytes", "1GB")
    body = {"messages": [{"role": "user", "content": TEXT.read_text()[7000:9000]}], "max_tokens": 8}
    answers, cached = [], []
    for _ in range(2):
        with serving(MODEL, *options) as served:
            found = served.post("/v1/chat/completions", **body)
        answers.append(found["choices"][0]["message"]["content"])
        cached.append(found["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert answers[0] == answers[1] and cached[0] == 0 and cached[1] >= found["usage"]["prompt_tokens"] - 32
