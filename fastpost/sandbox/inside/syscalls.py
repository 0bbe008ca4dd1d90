"""System calls by name: their numbers on x86_64 and aarch64, as the kernel's unistd.h has them."""

from __future__ import annotations

# What an ordinary Python program asks for and what reaches nothing but itself: files that are open or that Landlock
# lets it open, memory, clocks, its own signals and identity, waiting.
HARMLESS = """
read 0/63  write 1/64  readv 19/65  writev 20/66  pread64 17/67  pwrite64 18/68  lseek 8/62  close 3/57
close_range 436/436  dup 32/23  dup2 33/-  dup3 292/24  pipe 22/-  pipe2 293/59
stat 4/-  fstat 5/80  lstat 6/-  newfstatat 262/79  statx 332/291  access 21/-
faccessat 269/48  faccessat2 439/439  readlink 89/-  readlinkat 267/78  getcwd 79/17  chdir 80/49  fchdir 81/50
getdents64 217/61  statfs 137/43  fstatfs 138/44
unlink 87/-  unlinkat 263/35  rename 82/-  renameat 264/38  renameat2 316/276  ftruncate 77/46
fsync 74/82  fdatasync 75/83  umask 95/166  sendfile 40/71  copy_file_range 326/285
mmap 9/222  munmap 11/215  mprotect 10/226  mremap 25/216  mincore 27/232  brk 12/214
membarrier 324/283
futex 202/98  set_robust_list 273/99  set_tid_address 218/96  rseq 334/293
arch_prctl 158/-  sched_yield 24/124  sched_getaffinity 204/123  exit 60/93  exit_group 231/94
getpid 39/172  gettid 186/178  getppid 110/173  getpgrp 111/-  getpgid 121/155  getsid 124/156  getuid 102/174
geteuid 107/175  getgid 104/176  getegid 108/177  getresuid 118/148  getresgid 120/150  getgroups 115/158
getrandom 318/278  getrusage 98/165  getcpu 309/168
times 100/153  sysinfo 99/179  uname 63/160  clock_gettime 228/113  clock_getres 229/114  gettimeofday 96/169
time 201/-  nanosleep 35/101  clock_nanosleep 230/115  alarm 37/-  setitimer 38/103  getitimer 36/102
restart_syscall 219/128
rt_sigaction 13/134  rt_sigprocmask 14/135  rt_sigreturn 15/139  rt_sigpending 127/136  rt_sigtimedwait 128/137
rt_sigsuspend 130/133  sigaltstack 131/132  pause 34/-  wait4 61/260
poll 7/-  ppoll 271/73  select 23/-  pselect6 270/72  epoll_create1 291/20  epoll_ctl 233/21  epoll_wait 232/-
epoll_pwait 281/22  eventfd2 290/19  timerfd_create 283/85  timerfd_settime 286/86  timerfd_gettime 287/87
sendto 44/206  recvfrom 45/207  shutdown 48/210  getsockname 51/204  getpeername 52/205  getsockopt 55/209
"""
# What is allowed with some arguments only, or refused as if it did not exist: seccomp.py.
RULED = """
open 2/-  openat 257/56  clone 56/220  clone3 435/435  fcntl 72/25  ioctl 16/29  kill 62/129  tgkill 234/131
socketpair 53/199  madvise 28/233
"""
MACHINES = ("x86_64", "aarch64")


def numbers(table: str, machine: str) -> dict[str, int]:
    """Name -> number, of those that the machine has."""
    column, words = MACHINES.index(machine), table.split()
    pairs = zip(words[::2], (pair.split("/")[column] for pair in words[1::2]), strict=True)
    return {name: int(number) for name, number in pairs if number != "-"}
