// Only to link with: names of glibc's libdl.so.2 before 2.34; see old_libdl.cmake.
extern "C" {
void dlopen() {}
void dlsym() {}
}
