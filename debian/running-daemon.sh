daemon=/usr/sbin/ganeti-kvmd
daemon_util=/usr/lib/ganeti/daemon-util
pid_file=/var/run/ganeti/ganeti-kvmd.pid

# $1: the signal; status 0 if there is a running daemon to take it.
send_signal() {
    start-stop-daemon --stop --quiet --signal "$1" \
        --pidfile "$pid_file" --name ganeti-kvmd
}

is_running() {
    send_signal 0
}

# Ganeti's own daemon is compiled.
is_ours() {
    case $(readlink "/proc/$(cat "$pid_file")/exe") in
        */python3*) ;;
        *) false ;;
    esac
}

is_forbidden_by_policy() {
    command -v policy-rc.d >/dev/null || return
    status=0
    policy-rc.d ganeti restart || status=$?
    [ "$status" -eq 101 ]
}

# Ganeti's own daemon leaves its pid file if it was killed, and start-stop-daemon starts
# nothing on a pid file that is not root's alone: no instance would start any more.
remove_stale_pid_file() {
    case $(stat --format %u:%g "$pid_file" 2>/dev/null) in
        "" | 0:0) ;;
        *) rm -f "$pid_file" ;;
    esac
}

# Has systemd know the drop-in that came or went.
reload_units() {
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload || true
    fi
}

stop_by_pid_file() {
    start-stop-daemon --stop --quiet --oknodo --retry 30 \
        --pidfile "$pid_file" --name ganeti-kvmd
}

# Where systemd runs Ganeti, daemon-util stops the unit alone, and a daemon that was
# started before that was so goes on.
stop_and_start() {
    "$daemon_util" stop ganeti-kvmd
    stop_by_pid_file
    remove_stale_pid_file
    "$daemon_util" start ganeti-kvmd
}
