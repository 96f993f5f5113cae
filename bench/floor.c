/* The floor: bridges with taps, by ioctls and batched netlink messages alone.
 *
 *     floor up BRIDGES TAPS     BRIDGES bridges with TAPS persistent taps each, all up, in one group
 *     floor down                delete the group
 *
 * Prints the milliseconds of its work. Runs in the network namespace that it is called in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define GROUP 4711
#define BATCH 65536

static char batch[BATCH];
static size_t filled;
static int pending, sock;

static void die(const char *what) { perror(what); exit(1); }

static void flush(void) {
    char answer[65536];
    if (!pending) return;
    if (send(sock, batch, filled, 0) < 0) die("send");
    while (pending) {
        ssize_t got = recv(sock, answer, sizeof answer, 0);
        if (got < 0) die("recv");
        for (struct nlmsghdr *h = (void *)answer; NLMSG_OK(h, got); h = NLMSG_NEXT(h, got)) {
            struct nlmsgerr *e = NLMSG_DATA(h);
            if (h->nlmsg_type == NLMSG_ERROR && e->error) { errno = -e->error; die("netlink"); }
            pending--;
        }
    }
    filled = 0;
}

static struct nlmsghdr *begin(int type, int flags, int index, unsigned change, unsigned set) {
    if (filled + 512 > BATCH || pending == 128) flush();
    struct nlmsghdr *h = (void *)(batch + filled);
    struct ifinfomsg *i = NLMSG_DATA(h);
    memset(h, 0, NLMSG_LENGTH(sizeof *i));
    h->nlmsg_len = NLMSG_LENGTH(sizeof *i);
    h->nlmsg_type = type;
    h->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    i->ifi_index = index;
    i->ifi_change = change;
    i->ifi_flags = set;
    return h;
}

static struct rtattr *put(struct nlmsghdr *h, int type, const void *data, size_t size) {
    struct rtattr *a = (void *)((char *)h + NLMSG_ALIGN(h->nlmsg_len));
    a->rta_type = type;
    a->rta_len = RTA_LENGTH(size);
    if (size) memcpy(RTA_DATA(a), data, size);
    h->nlmsg_len = NLMSG_ALIGN(h->nlmsg_len) + RTA_ALIGN(a->rta_len);
    return a;
}

static void end(struct nlmsghdr *h) { filled += NLMSG_ALIGN(h->nlmsg_len); pending++; }

static void up(int bridges, int taps) {
    int group = GROUP;
    char name[IFNAMSIZ];
    for (int b = 0; b < bridges; b++) {
        struct nlmsghdr *h = begin(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, IFF_UP, IFF_UP);
        snprintf(name, sizeof name, "br%d", b);
        put(h, IFLA_IFNAME, name, strlen(name) + 1);
        put(h, IFLA_GROUP, &group, 4);
        struct rtattr *info = put(h, IFLA_LINKINFO | NLA_F_NESTED, NULL, 0);
        put(h, IFLA_INFO_KIND, "bridge", 7);
        info->rta_len = (char *)h + h->nlmsg_len - (char *)info;
        end(h);
    }
    flush();
    for (int b = 0; b < bridges; b++) {
        snprintf(name, sizeof name, "br%d", b);
        int master = if_nametoindex(name);
        for (int t = 0; t < taps; t++) {
            struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
            snprintf(request.ifr_name, IFNAMSIZ, "t%d-%d", b, t);
            int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
            if (fd < 0 || ioctl(fd, TUNSETIFF, &request) || ioctl(fd, TUNSETPERSIST, 1)) die("tun");
            close(fd);
            struct nlmsghdr *h = begin(RTM_NEWLINK, 0, 0, IFF_UP, IFF_UP);
            put(h, IFLA_IFNAME, request.ifr_name, strlen(request.ifr_name) + 1);
            put(h, IFLA_MASTER, &master, 4);
            put(h, IFLA_GROUP, &group, 4);
            end(h);
        }
    }
    flush();
}

static void down(void) {
    int group = GROUP;
    struct nlmsghdr *h = begin(RTM_DELLINK, 0, 0, 0, 0);
    put(h, IFLA_GROUP, &group, 4);
    end(h);
    flush();
}

int main(int argc, char **argv) {
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (sock < 0) die("socket");
    if (argc == 4 && !strcmp(argv[1], "up")) up(atoi(argv[2]), atoi(argv[3]));
    else if (argc == 2 && !strcmp(argv[1], "down")) down();
    else { fprintf(stderr, "floor up BRIDGES TAPS | floor down\n"); return 2; }
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("%.3f\n", (to.tv_sec - from.tv_sec) * 1e3 + (to.tv_nsec - from.tv_nsec) / 1e6);
    return 0;
}
