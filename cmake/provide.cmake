# How other projects get the libraries: names for targets, and what `cmake --install` puts where.

# provide_library(causal_conv1d_NAME): causal_conv1d::NAME in a project that adds this one, and in one
# that finds it installed.
function(provide_library target)
  string(REPLACE "causal_conv1d_" "" name ${target})
  add_library(causal_conv1d::${name} ALIAS ${target})
  target_include_directories(${target} INTERFACE
    $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  if(CAUSAL_CONV1D_PYTHON)
    install(TARGETS ${target} LIBRARY DESTINATION .)
    return()
  endif()
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name}
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  install(TARGETS ${target} EXPORT causal_conv1d LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})

  # The prefix as seen from the .pc file, so that an installation can be moved.
  set(folder ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig)
  file(RELATIVE_PATH prefix ${folder} ${CMAKE_INSTALL_PREFIX})
  string(REGEX REPLACE "/$" "" prefix ${prefix})
  foreach(name LIBDIR INCLUDEDIR)
    set(${name} ${CMAKE_INSTALL_${name}})
    if(NOT IS_ABSOLUTE "${${name}}")
      string(PREPEND ${name} "\${prefix}/")
    endif()
  endforeach()
  string(REPLACE "causal_conv1d_" "" name ${target})
  configure_file(cmake/causal_conv1d.pc.in ${target}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${target}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()

# The headers, and the CMake package of all libraries provided.
function(provide_package)
  foreach(header causal_conv1d.h selective_scan.h)
    configure_file(csrc/${header} include/${header} COPYONLY)
  endforeach()
  if(CAUSAL_CONV1D_PYTHON)
    return()
  endif()
  install(FILES csrc/causal_conv1d.h csrc/selective_scan.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  include(CMakePackageConfigHelpers)
  set(folder ${CMAKE_INSTALL_LIBDIR}/cmake/causal_conv1d)
  configure_package_config_file(cmake/causal_conv1dConfig.cmake.in causal_conv1dConfig.cmake
    INSTALL_DESTINATION ${folder} NO_SET_AND_CHECK_MACRO)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/causal_conv1dConfigVersion.cmake
    COMPATIBILITY SameMajorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/causal_conv1dConfig.cmake
                ${PROJECT_BINARY_DIR}/causal_conv1dConfigVersion.cmake DESTINATION ${folder})
  install(EXPORT causal_conv1d NAMESPACE causal_conv1d:: FILE causal_conv1dTargets.cmake
          DESTINATION ${folder})
endfunction()
