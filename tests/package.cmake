# An installation of BUILD, used by a program outside the project: the core where there is no MLX, and with MLX both parts.
#   cmake -DSOURCE=... -DBUILD=... -DWORK=... -DMLX_ROOT=... -P tests/package.cmake
cmake_minimum_required(VERSION 3.25)
file(REMOVE_RECURSE ${WORK})

function(run expected)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0 OR NOT output MATCHES "${expected}")
    message(FATAL_ERROR "${ARGN}: ${result}\n${output}")
  endif()
endfunction()

run("" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/core --component core)
run("" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/both --component core)
run("" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/both --component mlx)
if(EXISTS ${WORK}/core/include/turboquant/mlx OR NOT EXISTS ${WORK}/both/include/turboquant/mlx/kv_cache.h)
  message(FATAL_ERROR "MLX's headers are in the wrong component")
endif()
file(GLOB beside RELATIVE ${WORK}/both/include ${WORK}/both/include/*)
if(NOT beside STREQUAL "turboquant")
  message(FATAL_ERROR "headers are not below turboquant/ alone: ${beside}")
endif()

foreach(prefix core both)  # neither finds MLX
  run("" ${CMAKE_COMMAND} -S ${SOURCE}/examples/cpp -B ${WORK}/without_${prefix} -DCMAKE_PREFIX_PATH=${WORK}/${prefix}
    -DCMAKE_DISABLE_FIND_PACKAGE_MLX=ON)
  run("" ${CMAKE_COMMAND} --build ${WORK}/without_${prefix})
  run("[0-9]" ${WORK}/without_${prefix}/packed_attention)
  if(EXISTS ${WORK}/without_${prefix}/mlx_cache)
    message(FATAL_ERROR "mlx_cache was built without MLX")
  endif()
endforeach()
run("" ${CMAKE_COMMAND} -S ${SOURCE}/examples/cpp -B ${WORK}/with -DCMAKE_PREFIX_PATH=${WORK}/both -DMLX_ROOT=${MLX_ROOT})
run("" ${CMAKE_COMMAND} --build ${WORK}/with)
run("[0-9]" ${WORK}/with/mlx_cache)
