# Links dlopen and dlsym as before glibc 2.34, which moved them from libdl.so.2 into libc.so.6: linked
# the new way a library loads on no older system, linked the old way on both. The linker takes them
# from a stand-in for the old libdl.so.2; the program that loads the library has the true one.
include(CheckCXXSymbolExists)
check_cxx_symbol_exists(__GLIBC__ features.h CAUSAL_CONV1D_GLIBC)

# The version of glibc that each machine began with.
if(NOT CAUSAL_CONV1D_GLIBC OR NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(first_glibc)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(first_glibc GLIBC_2.2.5)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(first_glibc GLIBC_2.17)
endif()

if(first_glibc)
  # Not where the libraries are built, or programs that run there would load it.
  set(folder ${CMAKE_BINARY_DIR}/old_libdl)
  file(WRITE ${folder}/versions.map "${first_glibc} { global: *; };\n")
  add_library(causal_conv1d_old_libdl SHARED ${CMAKE_CURRENT_LIST_DIR}/old_libdl.cpp)
  set_target_properties(causal_conv1d_old_libdl PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${folder} NO_SONAME ON
    CXX_VISIBILITY_PRESET default)
  target_link_options(causal_conv1d_old_libdl PRIVATE -nostdlib -Wl,-soname,libdl.so.2
                                        -Wl,--version-script=${folder}/versions.map)
endif()

function(link_dl target)
  if(TARGET causal_conv1d_old_libdl)
    add_dependencies(${target} causal_conv1d_old_libdl)
    # As an option, so that CMake adds no RPATH for it.
    target_link_libraries(${target} PRIVATE "-Xlinker \"$<TARGET_FILE:causal_conv1d_old_libdl>\"")
  endif()
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
endfunction()
