#!/bin/sh
# The init of netorch's built-in guest image `tiny`, and everything else that runs in it.
#
# One script under several names, chosen by $0:
#   /init                       PID 1: mount, load the NICs' drivers, start DHCP, then hand over
#                               to busybox init, which keeps the shell on the console alive
#   /lib/netorch/late           the rest of the start, which no lease waits for: other drivers,
#                               the guest agent, the power button, the listener for hot-plug
#   /lib/netorch/dhcp           udhcpc's script
#   /lib/netorch/hotplug        runs for uevents of NICs and of virtio ports (etc/mdev.conf)
#   /etc/acpi/PWRF/00000080     the power button
#   /sbin/{poweroff,halt,reboot,shutdown}
#
# Order is speed: under TCG every process that is started delays the lease (one `mount` or `ip`: 4
# to 18 ms in a traced boot), so what the first DHCPDISCOVER does not need comes after it, and tests
# are the shell's own where it has one. Nothing here waits by sleeping: devices that come and go
# later do so as uevents. Only of a link that comes back no event tells a shell, so the kernel's
# count of that is read each second, which starts no process. Every step may run twice.
#
# With netorch.template on its command line, the guest gets ready to be copied (docs/guests-warm.md):
# its copies go on from there, in other QEMUs. Each QEMU has an identity, a token and the guest's
# name; where it isn't the one that was seen last, this is a copy: `wake`. Under TCG every piece of
# code that a copy runs for the first time has to be translated anew, so what counts on its way to
# the lease is how much different code there is: a shell that waits for it wakes up, gives the driver
# its NICs, which are there, and starts udhcpc. NICs of other models are hot-plugged. What either
# needs stands first in this file: a shell reads it as it goes.

export PATH=/sbin:/bin HOME=/root TERM=${TERM:-linux}

IDENTITY=/sys/firmware/qemu_fw_cfg/by_name/opt/netorch/identity/raw
VIRTIO_NET=/sys/bus/virtio/drivers/virtio_net

# once NAME: true for the first caller in this boot only; noclobber makes it atomic. No subshell,
# which would be a fork, and so not `:`, whose failed redirection would end the shell.
once() {
    set -C
    { true > "/run/$1"; } 2> /dev/null
    set -- $?
    set +C
    return "$1"
}

# wake: true if this has become a copy since the last look. It then takes the name that this QEMU has
# for the guest, which is another one than the template's, and the NICs that were kept for it.
wake() {
    [ -e $IDENTITY ] || return
    read -r token HOST_NAME < $IDENTITY # false: no newline ends it
    once "identity.$token" && ! once woken || return
    : > /run/clock
    echo "$HOST_NAME" > /proc/sys/kernel/hostname
    number=0
    for nic in $SPARE_NICS; do
        echo "$nic" > $VIRTIO_NET/bind
        begin "eth$number"
        number=$((number + 1))
    done
}

# begin NIC: udhcpc retries each second for ever, and stays to renew.
begin() {
    once "dhcp.$1" || return 0
    echo 0x1003 > "/sys/class/net/$1/flags" # up, broadcast, multicast: as `ip link set up`
    ask "$1"
}

ask() {
    udhcpc -f -i "$1" -s /lib/netorch/dhcp -p "/run/udhcpc.$1.pid" -t 20 -T 1 -A 1 \
        -O mtu ${HOST_NAME:+-x "hostname:$HOST_NAME"} > /dev/null 2>&1 &
}

case "$0 $ACTION $SUBSYSTEM" in
    */hotplug" add net")
        [ -e "/sys$DEVPATH/device" ] || exit 0
        wake
        begin "$INTERFACE"
        exit
        ;;
    */dhcp*)
        # At the start of udhcpc there is nothing to take away.
        [ "$1" != deconfig ] || [ -e "/run/lease.$interface" ] || [ -e "/run/keep.$interface" ] || exit 0
        ;;
esac

say() {
    echo "netorch-tiny: $*" > /dev/console
}

# Whichever shell has started it: that of the start, or one of the listener's.
continue_agent() {
    { read -r pid < /run/agent.pid; } 2> /dev/null && kill -CONT "$pid"
}

# gather FILE...: their lines, each once.
gather() {
    lines="
"
    for file in "$@"; do
        while read -r line; do
            case $lines in *"
$line
"*) continue ;; esac
            lines="$lines$line
"
        done < "$file"
    done 2> /dev/null
}

# Each NIC has a client, and what one's script has gathered may be old before it is written. So
# whoever writes looks whether it holds, until it does: the last one always looks.
write_resolv() {
    gather /run/resolv.*
    until
        wanted=$lines
        echo -n "${wanted#?}" > /etc/resolv.conf
        gather /etc/resolv.conf
        written=$lines
        gather /run/resolv.*
        [ "$written $lines" = "$wanted $wanted" ]
    do :; done
}

as_dhcp() {
    case $1 in
        deconfig | leasefail)
            # At the start of udhcpc there is nothing to take away, or it is to stay for a while.
            [ ! -e "/run/keep.$interface" ] || exec rm "/run/keep.$interface"
            [ -e "/run/lease.$interface" ] || exit 0
            rm -f "/run/lease.$interface" "/run/resolv.$interface"
            ip addr flush dev "$interface"
            write_resolv
            ;;
        bound | renew)
            read -r old 2> /dev/null < "/run/lease.$interface"
            [ -z "$old" ] || [ "$old" = "$ip/$mask" ] || ip addr flush dev "$interface"
            # By ioctl, ifconfig and route: `ip` and the kernel's netlink are much more code.
            ifconfig "$interface" "$ip" netmask "$subnet" ${broadcast:+broadcast "$broadcast"} \
                ${mtu:+mtu "$mtu"}
            read -r index < "/sys/class/net/$interface/ifindex"
            for gateway in $router; do
                metric=$((100 + index))
                { [ -z "$old" ] && route add default gw "$gateway" metric "$metric" dev "$interface"; } ||
                    ip route replace default via "$gateway" dev "$interface" metric "$metric"
                break
            done
            echo "$ip/$mask" > "/run/lease.$interface"
            {
                [ -z "$domain" ] || echo "search $domain"
                for server in $dns; do
                    echo "nameserver $server"
                done
            } > "/run/resolv.$interface"
            write_resolv
            [ -z "$hostname" ] || echo "$hostname" > /proc/sys/kernel/hostname
            # Last: netorch takes this line for the sign that all is in place.
            [ "$1 $old" = "renew $ip/$mask" ] || say "$interface $ip/$mask${router:+ gw ${router%% *}}"
            continue_agent
            ;;
    esac
}

case $0 in
    */dhcp)
        as_dhcp "$1"
        exit
        ;;
esac

# The modaliases of devices that no driver has, of the given buses' devices.
orphans() {
    for device in "$@"; do
        [ -e "$device/driver" ] || ! read -r alias < "$device/modalias" || echo "$alias"
    done 2> /dev/null
}

start_dhcp() {
    for nic in /sys/class/net/*; do
        nic=${nic##*/}
        [ ! -e "/sys/class/net/$nic/device" ] || begin "$nic"
    done
}

# ended NIC: it is gone, and so is what its DHCP client had.
ended() {
    read -r pid 2> /dev/null < "/run/udhcpc.$1.pid" && kill "$pid" 2> /dev/null
    rm -f "/run/dhcp.$1" "/run/keep.$1" "/run/udhcpc.$1.pid" "/run/lease.$1" "/run/resolv.$1"
    write_resolv
}

# Nothing tells a shell that it goes on in another QEMU, so this looks, as long as it is in a template.
# The listener and the agent have stood still since then (be_template), and do until the copy should
# have its lease: what the one hears of these NICs is known, and the other looks ten times a second
# whether the host is there.
await_copy() {
    until wake; do
        read -r -t 0.005 none <&3
    done
    read -r -t 1 none <&3
    continue_agent
    killall -CONT mdev
}

# Look each second whether this has become a copy, and whether a link has come back.
watch() {
    [ -z "$SPARE_NICS" ] || await_copy
    while :; do
        wake
        # Its clock has stood still since it was copied.
        [ ! -e /run/clock ] || { hwclock -s -u; rm /run/clock; }
        watch_links
        read -r -t 1 none <&3
    done
}

# Where a link comes back, the network may be another one: ask as if new, and keep the address until
# there is an answer, or none for 20 s. By SIGKILL: the old udhcpc must not remove the new one's file.
watch_links() {
    for nic in /sys/class/net/eth*; do
        nic=${nic##*/}
        read -r ups 2> /dev/null < "/sys/class/net/$nic/carrier_up_count" || continue
        eval "seen=\$ups_$nic; ups_$nic=$ups"
        [ "${seen:-$ups}" != "$ups" ] || continue
        read -r pid < "/run/udhcpc.$nic.pid" && kill -KILL "$pid" || continue
        : > "/run/keep.$nic"
        ask "$nic"
    done 2> /dev/null
}

start_agent() {
    for port in /sys/class/virtio-ports/*; do
        read -r role 2> /dev/null < "$port/name" || continue
        [ "$role" = org.qemu.guest_agent.0 ] && once agent || continue
        qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run > /run/qemu-ga.log 2>&1 &
        echo $! > /run/agent.pid
    done
}

# A shell on the screen, where there is one (0x03: display controllers): tiny's serial console has
# another. It is init's, which gives each shell the terminal anew; one that this script had started
# would ignore Ctrl-C, as all that a shell starts in the background.
start_screen() {
    for device in /sys/bus/pci/devices/*; do
        read -r class < "$device/class"
        case $class in
            0x03*)
                echo "tty1::respawn:-/bin/sh" >> /etc/inittab
                kill -HUP 1
                return
                ;;
        esac
    done
}

as_init() {
    mount -a
    read -r line < /proc/cmdline
    for word in $line; do
        case $word in
            netorch.hostname=*) export HOST_NAME="${word#*=}" ;;
            netorch.template) export TEMPLATE=yes ;;
        esac
    done
    echo "${HOST_NAME:-tiny}" > /proc/sys/kernel/hostname
    [ -z "$TEMPLATE" ] || exec init
    # Network class devices first, and for a virtio one (vendor 1af4) its driver with its bus's.
    nics=
    for device in /sys/bus/pci/devices/*; do
        read -r class < "$device/class"
        case $class in
            0x02*)
                read -r alias < "$device/modalias"
                nics="$nics $alias"
                case $alias in pci:v00001AF4*) nics="$nics virtio_net" ;; esac
                ;;
        esac
    done
    # A microvm has no PCI: its virtio devices are memory-mapped, and the ACPI names their places.
    for device in /sys/bus/platform/devices/LNRO0005:*; do
        [ ! -e "$device" ] || nics="virtio_mmio virtio_net"
        break
    done
    [ -z "$nics" ] || modprobe -a -q -b $nics 2> /dev/null
    start_dhcp
    exec init
}

as_late() {
    ip link set lo up
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs shm /dev/shm
    [ -z "$TEMPLATE" ] || keep_nics
    mdev -d > /dev/null 2>&1
    mkfifo /run/never # to wait at
    exec 3<> /run/never
    [ -n "$TEMPLATE" ] || watch &
    load_all
    start_screen
    # A second look, for what came after the first one and before the listener was there.
    start_dhcp
    [ -z "$TEMPLATE" ] || be_template
}

# The NICs of a template have no cable, and are for its copies: their drivers are loaded, and let go.
# No shell is to be started later to find out that there is nothing to be loaded for a NIC.
keep_nics() {
    modprobe -a -q -b virtio_pci virtio_net e1000 8139cp 2> /dev/null
    for nic in $VIRTIO_NET/virtio*; do
        [ ! -e "$nic" ] || SPARE_NICS="$SPARE_NICS ${nic##*/}"
    done
    for nic in $SPARE_NICS; do
        echo "$nic" > $VIRTIO_NET/unbind
    done
    rules=$(cat /etc/mdev.conf)
    for alias in 'pci:.*bc02.*' 'virtio:d00000001.*'; do
        rules="MODALIAS=$alias;.* 0:0 660 !
$rules"
    done
    echo "$rules" > /etc/mdev.conf
}

# It has to be able to tell that it is one. All that a kernel does in the first seconds after a boot
# (the last modprobe goes, the agent starts, the clock is changed) should not be left to every copy.
be_template() {
    if [ ! -e $IDENTITY ]; then
        say "unfit to be copied: its kernel has no driver qemu_fw_cfg"
    elif [ ! -e /sys/bus/acpi/drivers/vmgenid ]; then
        say "unfit to be copied: its kernel has no driver vmgenid"
    else
        wake # to have seen its own identity
        read -r -t 3 none <&3
        [ -z "$SPARE_NICS" ] || killall -STOP mdev qemu-ga
        say "fit to be copied"
        watch # and no end of this process, which would be left to the copies
    fi
}

# Disks come last: to load ahci takes 0.4 s, the time in which its empty ports are probed.
load_all() {
    modprobe -a -q -b button evdev qemu_fw_cfg 2> /dev/null
    acpid -d -l /dev/null > /dev/null 2>&1 &
    first= disks=
    for alias in $(orphans /sys/bus/pci/devices/*); do
        case $alias in
            pci:v00001AF4* | *bc0[!1]*) first="$first $alias" ;;
            *bc01*) disks="$disks $alias" ;;
        esac
    done
    [ -z "$first" ] || modprobe -a -q -b $first 2> /dev/null
    load_orphans /sys/bus/virtio/devices/*
    start_agent
    [ -z "$disks" ] || modprobe -a -q -b $disks 2> /dev/null
    load_orphans /sys/bus/scsi/devices/* /sys/bus/usb/devices/*
}

load_orphans() {
    aliases=$(orphans "$@")
    [ -z "$aliases" ] || modprobe -a -q -b $aliases 2> /dev/null
}

as_hotplug() {
    [ "$ACTION $SUBSYSTEM" != "remove net" ] || ended "$INTERFACE"
    # "change" tells that a port has its name by now: a look at "add" can come before that.
    [ "$SUBSYSTEM" != virtio-ports ] || start_agent
}

# The guest's memory is its root, so only mounted disks have anything to lose.
stop() {
    sync
    umount -a -r 2> /dev/null
    exec busybox "$1" -f
}

case $0 in
    /init) as_init ;;
    */late) as_late ;;
    */hotplug) as_hotplug ;;
    */reboot) stop reboot ;;
    */shutdown)
        case " $* " in
            *" -r "*) stop reboot ;;
        esac
        stop poweroff
        ;;
    *) stop poweroff ;;
esac
