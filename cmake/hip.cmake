# The library for AMD's GPUs: hipcc compiles the kernels for any strides from the CUDA sources, see
# csrc/cuda/gpu.h. The environment's PYTORCH_ROCM_ARCH ("gfx90a;gfx942") tells for which GPUs, as torch
# takes it; HIPCC names another compiler than the hipcc on PATH or of /opt/rocm.
find_program(hipcc NAMES "$ENV{HIPCC}" hipcc HINTS "$ENV{ROCM_PATH}/bin" PATHS /opt/rocm/bin)
if(NOT hipcc)
  message(FATAL_ERROR "CAUSAL_CONV1D_HIP=ON but there is no hipcc: put it on PATH or set HIPCC")
endif()
get_filename_component(hip_folder "${hipcc}" REALPATH)
get_filename_component(hip_folder "${hip_folder}/../.." ABSOLUTE)
find_library(hip_runtime amdhip64 HINTS "$ENV{ROCM_PATH}" "${hip_folder}"
             PATH_SUFFIXES lib "lib/${CMAKE_LIBRARY_ARCHITECTURE}" REQUIRED)
set(hip_architectures gfx90a gfx942 gfx1100)
if(NOT "$ENV{PYTORCH_ROCM_ARCH}" STREQUAL "")
  string(REGEX REPLACE "[ ,;]+" ";" hip_architectures "$ENV{PYTORCH_ROCM_ARCH}")
endif()
string(REPLACE ";" " " architecture_names "${hip_architectures}")
set(definitions CAUSAL_CONV1D_HIP CAUSAL_CONV1D_GENERAL CAUSAL_CONV1D_ARCHITECTURES="${architecture_names}")

# A fused multiply-add is only where it is written, as for CPUs.
set(options -x hip -std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra
    -Xarch_host -fstack-protector-strong -ffile-prefix-map=${PROJECT_SOURCE_DIR}=. -I${PROJECT_SOURCE_DIR}/csrc)
list(TRANSFORM definitions PREPEND -D OUTPUT_VARIABLE definition_options)
list(TRANSFORM hip_architectures PREPEND --offload-arch= OUTPUT_VARIABLE code_options)
foreach(name forward packed backward self_test pool update varlen_states)
  set(source ${PROJECT_SOURCE_DIR}/csrc/cuda/${name}.cu)
  set(object ${PROJECT_BINARY_DIR}/hip/${name}.o)
  add_custom_command(OUTPUT ${object} DEPENDS ${source} DEPFILE ${object}.d VERBATIM
    COMMAND "${hipcc}" ${options} ${definition_options} ${code_options} -MD -MT ${object} -MF ${object}.d
            -c ${source} -o ${object}
    COMMENT "Building HIP object hip/${name}.o")
  list(APPEND hip_objects ${object})
endforeach()
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/hip)
set_source_files_properties(${hip_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)

add_library(causal_conv1d_hip SHARED ${shared_sources} csrc/torch/register_cuda.cpp csrc/self_test.cpp
            csrc/cuda/backward_plan.cpp ${hip_objects})
target_compile_definitions(causal_conv1d_hip PRIVATE CAUSAL_CONV1D_HIP CAUSAL_CONV1D_GENERAL)
target_link_libraries(causal_conv1d_hip PRIVATE "${hip_runtime}")
set_target_properties(causal_conv1d_hip PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "")
finish_library(causal_conv1d_hip ${exports})
provide_library(causal_conv1d_hip)
message(STATUS "causal_conv1d: for AMD GPUs too, with code for ${architecture_names}")
