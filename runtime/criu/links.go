// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	remap "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

const (
	// remapImage says how open files without a name of their own are found again.
	remapImage = "remap-fpath.img"
	// imageHeader is the size of the two magic numbers in front of every image
	// (criu/include/magic.h).
	imageHeader = 8
	// remapSize bounds one entry: three numbers.
	remapSize = 64
)

// LinksFiles tells, at post-dump, whether CRIU has linked files of the container to
// names of its own ("link_remap.N"), which the restored file system must have and which
// CRIU removes when it lets go of the tasks. It does so for an open file whose name is
// gone while it has others (criu/files-reg.c, create_link_remap).
func (d *Dump) LinksFiles() (bool, error) {
	f, err := openat(d.imgs, remapImage, unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	linked, err := hasLinks(f)
	if err != nil {
		return false, fmt.Errorf("read image %s: %w", remapImage, err)
	}
	return linked, nil
}

func hasLinks(r io.Reader) (bool, error) {
	if _, err := io.CopyN(io.Discard, r, imageHeader); err != nil {
		return false, err
	}
	for {
		var size uint32
		err := binary.Read(r, binary.LittleEndian, &size)
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if size > remapSize {
			return false, fmt.Errorf("an entry of %d bytes", size)
		}
		b := make([]byte, size)
		if _, err := io.ReadFull(r, b); err != nil {
			return false, err
		}
		var e remap.RemapFilePathEntry
		if err := proto.Unmarshal(b, &e); err != nil {
			return false, err
		}
		if e.GetRemapType() == remap.RemapType_LINKED {
			return true, nil
		}
	}
}
