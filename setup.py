"""The native parts, which setup.cfg cannot describe. All else is in setup.cfg."""

from setuptools import Extension, setup

setup(
    cffi_modules=["native/build.py:ffibuilder"],
    ext_modules=[
        # No Python in it: it is built as an extension so that it is installed beside the package.
        Extension(
            "imagefs._preload",
            sources=["native/preload.c", "native/regions.c"],
            depends=["native/regions.h"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
)
