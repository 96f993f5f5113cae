#!/bin/sh
# What busybox udhcpc runs in the network namespace of a host when its lease comes, changes or goes.
# Its directory is the host's in the lab's run directory; `ip` is iproute2's or busybox's. What comes from DHCP
# can be told from what netorch set: the address has a lifetime, the route the protocol 16 (dhcp).
# servers.INTERFACE has what it says of name servers. The last step is a second name for that, resolv.INTERFACE, which
# netorch waits for.

case $1 in
    deconfig)
        ip addr flush dev "$interface"
        ip link set "$interface" up
        rm -f "resolv.$interface" "servers.$interface"
        ;;
    bound | renew)
        [ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
        [ "$1" = renew ] || ip addr flush dev "$interface"
        # 4294967295 stands for "infinite" in a lease, and for "no lifetime" in the kernel.
        [ "$lease" != 4294967295 ] || lease=4294967294
        ip addr replace "$ip/$mask" ${broadcast:+broadcast "$broadcast"} dev "$interface" \
            valid_lft "$lease" preferred_lft "$lease"
        for gateway in $router; do
            ip route replace default via "$gateway" dev "$interface" proto 16 \
                metric $((100 + ${interface#eth}))
            break
        done
        {
            [ -z "$domain" ] || echo "search $domain"
            for server in $dns; do
                echo "nameserver $server"
            done
        } > "servers.$interface"
        ;;
esac
# Of several interfaces the first one's servers come first. Each interface has a client, and the script of another one
# may put in place what it has read before this one wrote. So whoever comes last finds that out, and builds it again.
while :; do
    servers=$(cat servers.eth* 2> /dev/null)
    printf '%s\n' "$servers" > "resolv.new.$interface" && mv "resolv.new.$interface" resolv.conf || break
    [ "$(cat servers.eth* 2> /dev/null)" != "$(cat resolv.conf)" ] || break
done
[ ! -e "servers.$interface" ] || [ -e "resolv.$interface" ] || ln "servers.$interface" "resolv.$interface"
