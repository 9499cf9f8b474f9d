"""The program's name and its version, for all modules."""

VERSION = "1.1.0"
DAEMON_NAME = "ganeti-kvmd"
