"""The native parts, which setup.cfg cannot describe. All else is in setup.cfg."""

from setuptools import Extension, setup

setup(
    cffi_modules=["native/build.py:ffibuilder"],
    ext_modules=[
        # No Python in it: it is built as an extension so that it is installed beside the package.
        Extension(
            "imagefs._preload",
            sources=[f"native/{part}.c" for part in ["preload", "preload_pager", "regions", "userfault"]],
            depends=[f"native/{part}.h" for part in ["preload_pager", "regions", "userfault"]],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
