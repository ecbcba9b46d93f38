// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
)

// storageRef is what the rootfs mounts say about the snapshotter behind them.
type storageRef struct {
	// upper is the writable layer's directory; empty if the rootfs is not an
	// overlay or bind mount of the cohort snapshotter's layout.
	upper string
	// lowers are the read-only layers, topmost first.
	lowers []string
	// socket is cohortd's Storage socket; empty if the rootfs is another
	// snapshotter's.
	socket string
}

// storageOf reads the mounts that containerd hands to the shim. The cohort
// snapshotter keeps a snapshot in ROOT/snapshots/N/fs and listens on
// ROOT/host.sock.
func storageOf(mounts []*types.Mount) storageRef {
	var s storageRef
	for _, m := range mounts {
		switch {
		case m.Type == "overlay" || strings.HasSuffix(m.Type, "/overlay"):
			for _, o := range m.Options {
				if v, ok := strings.CutPrefix(o, "upperdir="); ok {
					s.upper = v
				}
				if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
					s.lowers = strings.Split(v, ":")
				}
			}
		case m.Type == "bind" && s.upper == "":
			s.upper = m.Source
		}
	}
	if s.upper == "" {
		return s
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(s.upper)))
	if sock := filepath.Join(root, "host.sock"); isSocket(sock) {
		s.socket = sock
	}
	return s
}

func isSocket(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode().Type() == os.ModeSocket
}

// checkpoints are the directories of the checkpoints that the image's layers
// hold, topmost first; none unless the topmost layer is one. Only the cohort snapshotter keeps
// any there, outside of every container's view.
func (s storageRef) checkpoints() []string {
	if s.socket == "" {
		return nil
	}
	var dirs []string
	for i, l := range s.lowers {
		dir := filepath.Join(filepath.Dir(l), "checkpoint")
		if fi, err := os.Lstat(dir); err == nil && fi.IsDir() {
			dirs = append(dirs, dir)
		} else if i == 0 {
			return nil
		}
	}
	return dirs
}
