# By Debian's g++-aarch64-linux-gnu; qemu-user runs what it builds.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
# Of this machine's libraries the headers of doctest alone.
set(doctest_DIR /usr/lib/cmake/doctest)
set(CMAKE_DISABLE_FIND_PACKAGE_Boost ON)
