"""The lab's Debian: a root file system built once with debootstrap, kept in .lab/ and booted by ``machine``.

    image = debian()          # builds it the first time, about two minutes
    image.disk                # a raw ext4 disk, never written to: machines boot snapshots and overlays of it
    image.site                # a second disk: the packages of requirements/run.txt for the guest's Python

The cache is keyed by what goes into it, so a changed recipe makes a new one. Several
test sessions may ask at once: a lock lets one of them build.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.need import lacking, need, need_root

TOP = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
GUEST_PYTHON = "3.11"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "iproute2", "openssh-server", "ca-certificates", "curl", "procps"),
    *("kmod", "sudo", "python3", "adduser", "init-system-helpers", "linux-image-cloud-amd64"),
)
# Everything the packages' tests want to see done by the machine itself is left out on purpose.
_NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=yes\n"
_FSTAB = "/dev/vda / ext4 errors=remount-ro 0 1\n/dev/vdb /opt/site ext4 ro,nofail 0 0\n"
_MIRROR_VARIABLE = "FLUX_LAB_MIRROR"


@dataclass(frozen=True)
class Image:
    """Everything a machine boots from. Read-only to its users."""

    disk: Path
    site: Path
    kernel: Path
    initrd: Path
    key: Path  # the SSH key root accepts


def debian() -> Image:
    """The image, built when it is not there. Skips (fails in CI) where it cannot be built."""
    need_root()
    need("qemu-system-x86_64", "qemu-img", "debootstrap", "mke2fs", "ssh", "ssh-keygen")
    cache = Path(os.environ.get("FLUX_LAB", TOP / ".lab"))
    cache.mkdir(exist_ok=True)
    with _only_one(cache / "lock"):
        key = _key(cache)
        machine = _system(cache, key)
        site = _site(cache)
    return Image(machine / "disk.img", site, machine / "vmlinuz", machine / "initrd.img", key)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(cache: Path) -> Path:
    key = cache / "id_ed25519"
    if not key.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "flux-lab", "-f", key], check=True)
    return key


def _system(cache: Path, key: Path) -> Path:
    recipe = [SUITE, *PACKAGES, _NETWORK, _FSTAB, key.with_suffix(".pub").read_text()]
    target = cache / f"debian-{_digest(*recipe)}"
    if target.exists():
        return target
    for old in cache.glob("debian-*"):
        shutil.rmtree(old)
    root = cache / "new" / "root"
    shutil.rmtree(root.parent, ignore_errors=True)
    root.mkdir(parents=True)
    log = cache / "debootstrap.log"
    with log.open("w") as output:
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root, _mirror()],
            check=True,
            stdout=output,
            stderr=output,
        )
    _configure(root, key)
    new = root.parent
    for name in ("vmlinuz", "initrd.img"):
        found = sorted((root / "boot").glob(f"{name}-*"))
        shutil.copyfile(found[-1], new / name)
    _disk(root, new / "disk.img", "6G")
    shutil.rmtree(root)
    new.rename(target)
    return target


def _configure(root: Path, key: Path) -> None:
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(key.with_suffix(".pub"), root / "root/.ssh/authorized_keys")
    (root / "etc/systemd/network/lab.network").write_text(_NETWORK)
    (root / "etc/fstab").write_text(_FSTAB)
    (root / "etc/hostname").write_text("lab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost lab\n::1 localhost\n")
    (root / "opt/site").mkdir()
    # A login that asks nobody's name server who we are, and no waiting for what is not there.
    (root / "etc/ssh/sshd_config.d/lab.conf").write_text("UseDNS no\nMaxStartups 100\nMaxSessions 100\n")
    subprocess.run(["chroot", root, "systemctl", "enable", "-q", "systemd-networkd", "ssh"], check=True)
    subprocess.run(
        ["chroot", root, "systemctl", "mask", "-q", "apt-daily.timer", "apt-daily-upgrade.timer", "man-db.timer"],
        check=True,
    )
    for unwanted in ("var/cache/apt/archives", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / unwanted, ignore_errors=True)


def _site(cache: Path) -> Path:
    """The locked packages, laid out for the guest's Python whatever runs the tests."""
    lock = TOP / "requirements" / "run.txt"
    target = cache / f"site-{_digest(lock.read_text(), GUEST_PYTHON)}.img"
    if target.exists():
        return target
    for old in cache.glob("site-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    tree = cache / "site-new"
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_34", "_2_28", "_2_17", "2014")]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes"),
            *("--only-binary=:all:", f"--python-version={GUEST_PYTHON}", *platforms, f"--target={tree}", "-r", lock),
        ],
        check=True,
    )
    _disk(tree, target, "300M")
    shutil.rmtree(tree)
    return target


def _disk(tree: Path, image: Path, size: str) -> None:
    # Without lazy initialisation the guest's first minutes would be spent on its inode tables.
    options = ["-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", str(tree)]
    subprocess.run(["mke2fs", *options, image, size], check=True)


def _mirror() -> str:
    """The Debian archive apt itself uses on this machine."""
    if _MIRROR_VARIABLE in os.environ:
        return os.environ[_MIRROR_VARIABLE]
    listing = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"]
    lines = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        origin, _, uri = line.partition(" ")
        if origin == "Debian":
            return uri
    lacking(f"apt's sources name no Debian archive (set {_MIRROR_VARIABLE})")
    raise AssertionError


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    print(debian())
