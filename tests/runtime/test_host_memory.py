"""What is left of the host's memory, on systems that are made up."""

import pytest

from cachec.runtime import host_memory
from cachec.runtime.host_memory import free_memory, peak_memory

GB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A Linux with 8 GB that can be had and 1 GB of swap; the function writes its files."""
    for name, place in {"MEMINFO": "meminfo", "CGROUPS": "groups", "OWN_CGROUPS": "own", "STATUS": "status"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / place)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for path in (tmp_path / "groups").rglob("memory_*"):
            path.rename(path.with_name(path.name.replace("memory_", "memory.")))

    write(meminfo=f"MemTotal: {9 << 20} kB\nMemAvailable: {8 << 20} kB\nSwapFree: {1 << 20} kB\nHugePages_Total: 0\n")
    return write


def test_it_is_what_can_be_had_and_swap(system):
    assert free_memory() == 9 * GB


def test_a_container_leaves_less_but_for_what_it_can_drop(system):
    system(own="0::/box/inner\n", groups__box__memory_max=f"{4 * GB}\n", groups__box__memory_current=f"{3 * GB}\n")
    assert free_memory() == GB
    system(groups__box__memory_stat=f"anon 5\ninactive_file {GB}\nactive_file {GB}\n", groups__box__inner__memory_max="max\n")
    assert free_memory() == 3 * GB


def test_older_containers_have_other_names(system):
    system(own="4:cpu:/\n3:memory:/\n", groups__memory__memory_limit_in_bytes=f"{2 * GB}\n")
    system(groups__memory__memory_usage_in_bytes=f"{3 * GB}\n")
    assert free_memory() == 0


def test_other_systems_do_not_say(system, tmp_path):
    (tmp_path / "meminfo").unlink()
    assert free_memory() is None


def test_the_peak_is_the_systems_word_for_it_or_nothing(system):
    assert peak_memory() is None
    system(status="Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 1000 kB\n")
    assert peak_memory() == 1234 * 1024
