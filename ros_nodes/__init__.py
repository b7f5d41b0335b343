"""ROS 2 side: the only package that knows rclpy messages."""
