// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const sysctlRoot = "/proc/sys"

// skipped sysctls: secrets and random seeds, what follows from a link's own
// settings, and what reads back differently than it was written.
var skipped = map[string]bool{
	"tcp_fastopen_key": true, "stable_secret": true, "mtu": true, "flush": true,
	"fib_multipath_hash_seed": true,
}

// readSysctls reads what can be read and written below /proc/sys/net. The kernel
// shows the values of the calling thread's namespace.
func readSysctls() (map[string]string, error) {
	values := make(map[string]string)
	err := fs.WalkDir(os.DirFS(sysctlRoot), "net", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() || skipped[path.Base(p)] {
			return nil
		}
		info, err := d.Info()
		if err != nil || info.Mode().Perm()&0o600 != 0o600 {
			return nil //nolint:nilerr // a link's directory went with the link
		}
		data, err := os.ReadFile(path.Join(sysctlRoot, p))
		if err != nil {
			// Some refuse to be read before they are written (EIO), or at all.
			return nil //nolint:nilerr // see above
		}
		values[p] = strings.TrimRight(string(data), "\n")
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading sysctls: %w", err)
	}
	return values, nil
}

// changedSysctls finds those that differ from a namespace made just now. The
// settings of an interface are compared with the new namespace's defaults for
// interfaces.
func changedSysctls(ns *os.File) (map[string]string, error) {
	var have, fresh map[string]string
	err := inside(ns, func() (err error) {
		have, err = readSysctls()
		return err
	})
	if err != nil {
		return nil, err
	}
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a namespace to compare with: %w", err)
		}
		fresh, err = readSysctls()
		return err
	})
	if err != nil {
		return nil, err
	}
	changed := make(map[string]string)
	for key, value := range have {
		base, ok := fresh[key]
		if !ok {
			base, ok = fresh[defaultFor(key)]
		}
		if ok && base != value {
			changed[key] = value
		}
	}
	return changed, nil
}

// perLink splits net/{ipv4,ipv6}/{conf,neigh}/LINK/NAME.
func perLink(key string) (parts []string, ok bool) {
	parts = strings.Split(key, "/")
	return parts, len(parts) == 5 && (parts[2] == "conf" || parts[2] == "neigh")
}

func defaultFor(key string) string {
	parts, ok := perLink(key)
	if !ok {
		return ""
	}
	parts[3] = "default"
	return strings.Join(parts, "/")
}

// linkOf is the interface whose setting key is; empty for the rest.
func linkOf(key string) string {
	parts, ok := perLink(key)
	if !ok || parts[3] == "all" || parts[3] == "default" {
		return ""
	}
	return parts[3]
}

// writeSysctls sets values in the calling thread's namespace and returns those
// that it could not set.
func writeSysctls(values map[string]string) (failed []string) {
	// Root keeps a hostile key from leaving the directory.
	root, err := os.OpenRoot(sysctlRoot)
	if err != nil {
		return []string{fmt.Sprintf("sysctls: %v", err)}
	}
	defer root.Close()
	for _, key := range ordered(values) {
		f, err := root.OpenFile(key, os.O_RDWR, 0)
		if err == nil {
			// Writing a value anew can reset others (ip_forward does).
			var data [4097]byte
			n, _ := f.Read(data[:])
			if strings.TrimRight(string(data[:n]), "\n") != values[key] {
				_, err = f.WriteAt([]byte(values[key]), 0)
			}
			f.Close()
		}
		if err != nil {
			failed = append(failed, fmt.Sprintf("sysctl %s=%s: %v", strings.ReplaceAll(key, "/", "."), values[key], err))
		}
	}
	return failed
}

// ordered puts ip_forward first, because it resets others, and "all" and
// "default" before single interfaces, which follow them.
func ordered(values map[string]string) []string {
	rank := func(key string) int {
		parts, ok := perLink(key)
		switch {
		case key == "net/ipv4/ip_forward":
			return 0
		case !ok:
			return 1
		case parts[3] == "all":
			return 2
		case parts[3] == "default":
			return 3
		}
		return 4
	}
	return slices.SortedFunc(maps.Keys(values), func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
}
