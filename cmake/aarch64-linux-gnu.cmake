# Builds for 64-bit Arm Linux, Jetsons among them, on another machine:
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
# It needs g++-aarch64-linux-gnu, and for the CUDA library the machine's own CUDA toolkit and nothing
# of the target: device code and headers do not depend on the host, and of libcudart only the names
# are linked, through a stub. scripts/dev/build_wheel.py makes wheels with it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

# CMake reads this file again for each of its checks.
if(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
endif()
if(nvcc)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  # nvcc itself tells where its toolkit is: it may be started through a script elsewhere.
  execute_process(COMMAND "${nvcc}" --dryrun -E -x cu /dev/null OUTPUT_QUIET ERROR_VARIABLE settings)
  string(REGEX MATCH "#\\$ TOP=([^\n]+)" settings "${settings}")
  get_filename_component(toolkit "${CMAKE_MATCH_1}" REALPATH)
  file(GLOB libcudart "${toolkit}/lib64/libcudart.so.*" "${toolkit}/lib/libcudart.so.*"
       "${toolkit}/targets/*/lib/libcudart.so.*")
  if(NOT libcudart)
    message(FATAL_ERROR "there is no libcudart.so.* in the CUDA toolkit ${toolkit}; install its "
                        "cudart package, or set CUDACXX to the nvcc of a whole toolkit")
  endif()
  list(GET libcudart 0 libcudart)
  file(STRINGS "${libcudart}" names REGEX "^(__)?cuda[A-Z][A-Za-z0-9_]+$")
  list(REMOVE_DUPLICATES names)
  list(TRANSFORM names APPEND "(void) {}")
  list(TRANSFORM names PREPEND "void ")
  list(JOIN names "\n" definitions)
  file(STRINGS "${libcudart}" soname REGEX "^libcudart\\.so\\.[0-9]+$")
  list(GET soname 0 soname)
  set(stubs "${CMAKE_BINARY_DIR}/cudart-stub")
  file(WRITE "${stubs}/cudart.c" "${definitions}\n")
  execute_process(COMMAND aarch64-linux-gnu-gcc -shared -nostdlib -w "-Wl,-soname,${soname}"
                          -o "${stubs}/libcudart.so" "${stubs}/cudart.c" COMMAND_ERROR_IS_FATAL ANY)
  # CMake's checks and links name these too.
  file(WRITE "${stubs}/libcudart_static.a" "INPUT(-lcudart)\n")
  file(WRITE "${stubs}/libcudadevrt.a" "!<arch>\n")
  # nvcc looks for the target's headers and libraries only where a cross toolkit would have them.
  set(CMAKE_CUDA_FLAGS_INIT "-I${toolkit}/include -L${stubs} --cudart=shared --cudadevrt=none")
  if(EXISTS "${toolkit}/include/cccl")
    string(APPEND CMAKE_CUDA_FLAGS_INIT " -isystem ${toolkit}/include/cccl")
  endif()
  set(CMAKE_SHARED_LINKER_FLAGS_INIT "-L${stubs}")
endif()
