# Ganeti's unit of this name, which has been ours in version 1.0.0. dpkg goes by names,
# and /lib and /usr/lib are two for it: upgraded from 1.0.0, it would remove Ganeti's
# file as one that we have no more. It doesn't while all but Ganeti have it elsewhere.
units="/lib/systemd/system/ganeti-kvmd.service /usr/lib/systemd/system/ganeti-kvmd.service"

keep_ganetis_unit() {
    dpkg-query --listfiles ganeti 2>/dev/null |
        grep -q /systemd/system/ganeti-kvmd.service || return 0
    for unit in $units; do
        dpkg-divert --quiet --package ganeti --add --no-rename \
            --divert "$unit.ganeti-kvmd" "$unit"
    done
}

release_ganetis_unit() {
    for unit in $units; do
        [ "$(dpkg-divert --truename "$unit")" = "$unit.ganeti-kvmd" ] || continue
        dpkg-divert --quiet --package ganeti --remove --no-rename "$unit"
    done
}
