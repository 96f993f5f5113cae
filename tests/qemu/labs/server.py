"""A server that tells each client how it sees it, and the client for it; run in hosts as a script.

server.py               TCP and UDP on PORT: answers with the client's address and port, the UDP
                        one in TFTP, which is the UDP client that busybox has. Pings are told on
                        stdout: `ping ADDRESS`.
server.py ADDRESS PORT  connects, prints the first line of the answer; or `refused` and the ICMP
                        message that did it: `refused by 10.0.0.1: type 3 code 3`; or `silent`.
"""

import selectors
import socket
import sys

PORT = 7000
_ECHO_REQUEST = 8
_TFTP_READ = b"\0\1"
_TFTP_FIRST_BLOCK = b"\0\3\0\1"
_SECONDS = 5.0  # until this is called silence; a SYN is repeated after one and three
_LATE = 60.0  # for a server that has accepted, on a busy machine


def serve() -> None:
    tcp = socket.create_server(("", PORT), backlog=100)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("", PORT))
    icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    selector = selectors.DefaultSelector()
    for listener in (tcp, udp, icmp):
        selector.register(listener, selectors.EVENT_READ)
    say("ready")
    while True:
        for key, _events in selector.select():
            if key.fileobj is tcp:
                connection, peer = tcp.accept()
                with connection:
                    connection.sendall(f"{peer[0]} {peer[1]}\n".encode())
            elif key.fileobj is udp:
                packet, peer = udp.recvfrom(2048)
                if packet.startswith(_TFTP_READ):
                    udp.sendto(_TFTP_FIRST_BLOCK + f"{peer[0]} {peer[1]}\n".encode(), peer)
            elif icmp_of(packet := icmp.recv(2048))[0] == _ECHO_REQUEST:
                say(f"ping {socket.inet_ntoa(packet[12:16])}")


def ask(address: str, port: int) -> str:
    icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    icmp.setblocking(False)
    try:
        with socket.create_connection((address, port), timeout=_SECONDS) as connection:
            connection.settimeout(_LATE)
            return connection.makefile().readline().strip()
    except TimeoutError:
        return "silent"
    except OSError as error:
        try:
            packet = icmp.recv(2048)  # it has come before TCP heard of it
        except BlockingIOError:
            return f"{error.strerror} without ICMP"
        kind, code = icmp_of(packet)
        return f"refused by {socket.inet_ntoa(packet[12:16])}: type {kind} code {code}"


def icmp_of(packet: bytes) -> tuple[int, int]:
    """Type and code of the ICMP message in an IP packet."""
    length = (packet[0] & 0x0F) * 4
    return packet[length], packet[length + 1]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:]:
        say(ask(sys.argv[1], int(sys.argv[2])))
    else:
        serve()
