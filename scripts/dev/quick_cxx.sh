#!/bin/sh
# A C++ compiler that takes a fraction of the time, for tests of builds whose code need not be fast.
exec c++ "$@" -O0 -U_FORTIFY_SOURCE
