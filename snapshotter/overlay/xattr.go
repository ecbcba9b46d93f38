// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Attributes of overlayfs (fs/overlayfs/overlayfs.h). A container's own attributes of this
// name space are stored with "overlay." once more (ovl_own_xattr_set).
const (
	xattrPrefix   = "trusted.overlay."
	xattrOpaque   = xattrPrefix + "opaque"
	xattrWhiteout = xattrPrefix + "whiteout"
)

// Values of xattrOpaque.
const (
	opaqueYes    = "y"
	opaqueXattrs = "x" // holds whiteouts that are attributes
)

// notes are the attributes, after xattrPrefix, that one mount keeps for itself: they say
// nothing about the file. opaque is compared as a property of the directory.
var notes = map[string]bool{"opaque": true, "origin": true, "upper": true, "nlink": true, "impure": true, "uuid": true, "whiteout": true}

func opaqueFlag(d *os.File) (string, error) {
	var buf [8]byte
	n, err := unix.Fgetxattr(int(d.Fd()), xattrOpaque, buf[:])
	switch {
	case err == nil:
		return string(buf[:n]), nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ERANGE):
		return "", nil // not a value that the kernel knows
	}
	return "", &os.PathError{Op: "getxattr " + xattrOpaque, Path: d.Name(), Err: err}
}

// sameXattrs compares what belongs to two files, leaving overlayfs' notes aside.
func sameXattrs(a, b *Entry) (bool, error) {
	x, err := xattrs(a.Path())
	if err != nil {
		return false, err
	}
	y, err := xattrs(b.Path())
	if err != nil {
		return false, err
	}
	return maps.Equal(x, y), nil
}

func xattrs(path string) (map[string]string, error) {
	names, err := sized(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) }, 256)
	if errors.Is(err, unix.ENOTSUP) || err == nil && len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	out := map[string]string{}
	for n := range bytes.SplitSeq(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		name := string(n)
		if own, ok := strings.CutPrefix(name, xattrPrefix); ok {
			if own == "redirect" || own == "metacopy" {
				return nil, fmt.Errorf("overlayfs kept part of it in a lower layer (%s): mount with redirect_dir=off,metacopy=off: %w", name, errdefs.ErrFailedPrecondition)
			}
			if notes[own] {
				continue
			}
		}
		v, err := sized(func(buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) }, 256)
		if err != nil {
			return nil, &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		out[name] = string(v)
	}
	return out, nil
}

// sized calls fn with a buffer of the size first, and with one that is large enough where that was not.
func sized(fn func([]byte) (int, error), first int) ([]byte, error) {
	buf := make([]byte, first)
	for {
		n, err := fn(buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) {
			return nil, err
		}
		if n, err = fn(nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n)
	}
}

// procPath names an open file for system calls that take a path.
func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
