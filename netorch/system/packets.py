"""Capturing: a packet socket with its ring, made in a lab's place, read by whoever holds it.

The socket belongs to the network namespace in which it was opened, wherever its descriptor goes;
so nobody has to enter the place to read it. The ring is memory that the kernel writes frames to
(packet(7), PACKET_RX_RING, version 2): capturing has begun when `listen` returns, costs no process,
and what was captured is there to read at once. A full ring drops frames and counts them.

The file is a classic pcap with nanoseconds (draft-ietf-opsawg-pcap), which every tool reads.
"""

import mmap
import socket
import struct

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_ADD_MEMBERSHIP, _RX_RING, _STATISTICS, _VERSION = 1, 5, 6, 10
_MR_PROMISC = 1
_V2 = 1
_FRAME = 2048
_BLOCK = 1 << 16
_IN_USE = 0x1
_VLAN_VALID = 0x10
_HEADER = struct.Struct("=IIIHHIIHH")  # struct tpacket2_hdr of <linux/if_packet.h>
_PCAP = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
_RECORD = struct.Struct("=IIII")


def listen(device: str, frames: int) -> socket.socket:
    """Begin to capture on an interface of this network namespace, into a ring of so many frames.

    A frame is kept up to about 1,980 bytes. Raises OSError.
    """
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        opened.setsockopt(_SOL_PACKET, _VERSION, _V2)
        blocks = max(1, frames * _FRAME // _BLOCK)
        ring = struct.pack("=IIII", _BLOCK, blocks, _FRAME, blocks * (_BLOCK // _FRAME))
        opened.setsockopt(_SOL_PACKET, _RX_RING, ring)
        # A bridge shows what it forwards between its ports to promiscuous listeners only.
        index = socket.if_nametoindex(device)
        member = struct.pack("=iHH8s", index, _MR_PROMISC, 0, b"")
        opened.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, member)
        opened.bind((device, _ETH_P_ALL))
    except OSError:
        opened.close()
        raise
    return opened


class Ring:
    """The reading end. Frames are taken out once, by `take`."""

    def __init__(self, fd: int, frames: int) -> None:
        """`frames` as given to `listen`; the descriptor is this object's from now on."""
        self._socket = socket.socket(fileno=fd)
        size = max(1, frames * _FRAME // _BLOCK) * _BLOCK
        self._memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._size = size
        self._at = 0
        self.count = 0
        self._lost = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> bytes:
        """The frames that have come in since the last call, as pcap records."""
        records = bytearray()
        while self._taken_into(records):
            self._memory[self._at : self._at + 4] = b"\0\0\0\0"  # the kernel's again
            self._at = (self._at + _FRAME) % self._size
            self.count += 1
        return bytes(records)

    def lost(self) -> int:
        """How many frames didn't find room in the ring so far."""
        answer = self._socket.getsockopt(_SOL_PACKET, _STATISTICS, 8)  # since it was last asked
        self._lost += struct.unpack("=II", answer)[1]
        return self._lost

    def close(self) -> None:
        self._memory.close()
        self._socket.close()

    def _taken_into(self, records: bytearray) -> bool:
        status, length, kept, start, _net, sec, nsec, tag, tpid = _HEADER.unpack_from(
            self._memory, self._at
        )
        if not status & _IN_USE:
            return False
        frame = self._memory[self._at + start : self._at + start + kept]
        if status & _VLAN_VALID:  # the kernel has taken the tag out of the frame
            frame = frame[:12] + struct.pack(">HH", tpid or 0x8100, tag) + frame[12:]
            length += 4
        records += _RECORD.pack(sec, nsec, len(frame), length) + frame
        return True


def pcap(records: bytes) -> bytes:
    """A whole file."""
    return _PCAP + records
