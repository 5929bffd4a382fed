"""Native stepping of MuJoCo's simulators: a C++ source, how it is built at first use, and how it is called."""
