"""Ganeti's ssconf files, and what they say of this node."""

from __future__ import annotations

import collections
import enum
import os
from collections.abc import Callable, Iterator

from kvmd_file import open_regular_file

#: Bytes that a setting may have: some thousand nodes.
LONGEST_SETTING = 1 << 20


class Level(enum.Enum):
    """What a finding means for the detection of shutdowns on this node."""

    OK = "ok"
    WARN = "warn"
    #: Nothing is detected; as a cluster's setting: nothing is to be detected.
    FAIL = "FAIL"
    #: Nor can it be told what the setting is.
    BROKEN = "BROKEN"


#: A judged setting or fact, and one line for the administrator, with the remedy.
Finding = collections.namedtuple("Finding", "level text")


def judge_hypervisors(text: str) -> Finding:
    """Judge ssconf_hypervisor_list: a hypervisor's name per line."""
    names = text.split()
    if "kvm" in names:
        return Finding(Level.OK, f"enabled hypervisors: {', '.join(names)}")
    return Finding(
        Level.FAIL,
        f"kvm is not among the enabled hypervisors ({', '.join(names)}); to enable it:"
        " gnt-cluster modify --enabled-hypervisors=...,kvm",
    )


def judge_user_shutdown(text: str) -> Finding:
    """Judge ssconf_enabled_user_shutdown: True or False."""
    value = text.strip()
    if value == "True":
        return Finding(Level.OK, "user shutdown is enabled (True)")
    if value == "False":
        return Finding(
            Level.FAIL,
            "user shutdown is not enabled (False); to enable it:"
            " gnt-cluster modify --user-shutdown=yes",
        )
    return Finding(Level.BROKEN, f"neither True nor False: {text[:80]!r}")


def judge_vm_capable(text: str, host: str) -> Finding:
    """Judge ssconf_node_vm_capable: a line `node=True` or `node=False` per node.

    The host is this node if its name is listed, or the first label of one name that is.
    """
    capable = {}
    for line in text.splitlines():
        node, _, value = line.strip().partition("=")
        if value not in {"True", "False"}:
            text = f"a line that is not like node=True: {line[:80]!r}"
            return Finding(Level.BROKEN, text)
        capable[node.lower()] = value == "True"
    namesakes = [node for node in capable if node.partition(".")[0] == host]
    node = host if host in capable or len(namesakes) != 1 else namesakes[0]
    if node not in capable:
        may_be = f"may be any of {', '.join(namesakes)}"
        return Finding(
            Level.WARN,
            f"node {host} {may_be if namesakes else 'is not listed'}; taking it for"
            " vm_capable (compare with: gnt-node list)",
        )
    if capable[node]:
        return Finding(Level.OK, f"node {node} is vm_capable (True)")
    return Finding(
        Level.FAIL,
        f"node {node} is not vm_capable (False); to make it so:"
        f" gnt-node modify --vm-capable=yes {node}",
    )


def read_ssconf(path: str) -> str:
    """Return the text of one of Ganeti's ssconf files. Raises OSError, ValueError."""
    with open(open_regular_file(path, os.O_RDONLY), "rb") as file:
        return file.read(LONGEST_SETTING).decode()


def reason_of(error: OSError | ValueError) -> str:
    """Return what went wrong, without the path, which an OSError holds as well."""
    return error.strerror or "" if isinstance(error, OSError) else str(error)


def judge_cluster(ssconf_dir: str) -> Iterator[Finding]:
    """Judge the cluster's settings, in the order in which the daemon asks for them."""
    judges: dict[str, Callable[[str], Finding]] = {
        "ssconf_hypervisor_list": judge_hypervisors,
        "ssconf_enabled_user_shutdown": judge_user_shutdown,
        "ssconf_node_vm_capable": lambda text: judge_vm_capable(text, host_name()),
    }
    for name, judge in judges.items():
        path = os.path.join(ssconf_dir, name)
        try:
            finding = judge(read_ssconf(path))
        except FileNotFoundError:
            finding = Finding(
                Level.FAIL,
                "does not exist: this node is in no Ganeti cluster (gnt-cluster init,"
                " gnt-node add)",
            )
        except (OSError, ValueError) as error:
            finding = Finding(Level.BROKEN, f"cannot be read: {reason_of(error)}")
        if finding.level is Level.BROKEN:
            text = f"{finding.text}; to write it anew: gnt-cluster redist-conf"
            finding = Finding(Level.BROKEN, text)
        yield Finding(finding.level, f"{path}: {finding.text}")


def host_name() -> str:
    """Return the name of this host, as Ganeti writes it, and as nobody need be asked.

    No name server: one that does not answer would keep the daemon deaf for seconds.
    """
    return os.environ.get("GANETI_HOSTNAME", os.uname().nodename).lower()
