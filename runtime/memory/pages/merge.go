// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// Merged is the newest checkpoint of a chain as if it built on none: files that
// are read as they would be, and of which none is written.
type Merged struct {
	// Files are in the order of their names.
	Files []MergedFile
}

// MergedFile is one file of a merged checkpoint.
type MergedFile struct {
	Name string
	// Size in bytes.
	Size int64
	open func() (io.ReadCloser, error)
}

// Open returns the file's content, Size bytes of it. Several can be open at a
// time; each is read by one goroutine. The chain must stay open meanwhile.
func (f MergedFile) Open() (io.ReadCloser, error) {
	r, err := f.open()
	if err != nil {
		return nil, fmt.Errorf("open %s of a merged checkpoint: %w", f.Name, err)
	}
	return r, nil
}

// Merge makes a full checkpoint of one level out of the newest of a chain: all
// files *.img of its directory, with pagemaps that mention no parent, and pages
// files put together from wherever the pages are. What comes out depends on
// the chain's files only.
func Merge(chain *Chain) (*Merged, error) {
	names, err := chain.names()
	if err != nil {
		return nil, fmt.Errorf("list the files of a merged checkpoint: %w", err)
	}
	pageFiles := map[string]*memory{}
	for _, m := range chain.objects {
		pageFiles[m.top.name] = m
	}
	out := &Merged{}
	for _, name := range names {
		if !strings.HasSuffix(name, imageSuffix) {
			continue
		}
		f := MergedFile{Name: name}
		if o, ok := parseObject(name); ok {
			m := chain.lookup(o)
			if m == nil {
				return nil, fmt.Errorf("%s has come to %s since it was read: %w", name, chain.levels[0].path, errImage)
			}
			err = f.pagemap(m)
		} else if m := pageFiles[name]; m != nil {
			f.pages(m)
		} else if _, err := parsePagesName(name); err == nil {
			continue // of no pagemap
		} else if err := f.plain(chain.levels[0]); err != nil {
			return nil, err
		}
		if err != nil {
			return nil, err
		}
		out.Files = append(out.Files, f)
	}
	return out, nil
}

// parsePagesName returns the id in the name of a pages file.
func parsePagesName(name string) (id uint32, err error) {
	if _, err := fmt.Sscanf(name, pagesPrefix+"%d"+imageSuffix, &id); err != nil || pagesName(id) != name {
		return 0, fmt.Errorf("%q is not the name of a pages file: %w", name, errImage)
	}
	return id, nil
}

// plain is a file of the newest checkpoint as it is.
func (f *MergedFile) plain(d *levelDir) error {
	file, err := d.open(f.Name)
	if err != nil {
		return err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return err
	}
	f.Size = st.Size()
	name, size := f.Name, f.Size
	f.open = func() (io.ReadCloser, error) {
		file, err := d.open(name)
		if err != nil {
			return nil, err
		}
		if st, err := file.Stat(); err != nil || st.Size() != size {
			file.Close()
			return nil, fmt.Errorf("%s has changed: %w", name, errImage)
		}
		return file, nil
	}
	return nil
}

// pagemap is one in which everything is present.
func (f *MergedFile) pagemap(m *memory) error {
	id, err := parsePagesName(m.top.name)
	if err != nil {
		return err
	}
	full := &pagemap{pagesID: id}
	for _, r := range m.has {
		full.appendPresent(r)
	}
	var size counter
	if err := full.encode(&size); err != nil {
		return err
	}
	f.Size = int64(size)
	f.open = func() (io.ReadCloser, error) {
		var b bytes.Buffer
		err := full.encode(&b)
		return io.NopCloser(&b), err
	}
	return nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// pages is a pages file put together.
func (f *MergedFile) pages(m *memory) {
	f.Size = int64(count(m.has) * pageSize)
	f.open = func() (io.ReadCloser, error) {
		return &pagesReader{rest: m.pieces, files: sourceFiles{}}, nil
	}
}

// pagesReader reads pieces one after the other.
type pagesReader struct {
	rest  []piece
	at    uint64 // bytes of the first that were read
	files sourceFiles
}

func (r *pagesReader) Read(b []byte) (n int, err error) {
	for n < len(b) && len(r.rest) > 0 {
		p := r.rest[0]
		f, err := r.files.get(p.src)
		if err != nil {
			return n, err
		}
		size := p.End - p.Start
		part := min(uint64(len(b)-n), size-r.at)
		// The file is long enough, it was when it was opened.
		got, err := f.ReadAt(b[n:n+int(part)], int64(p.off+r.at))
		n += got
		r.at += uint64(got)
		if uint64(got) < part {
			return n, fmt.Errorf("read pages of %s: %w", p.src.path(), err)
		}
		if r.at == size {
			r.rest, r.at = r.rest[1:], 0
		}
	}
	if n == 0 && len(b) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (r *pagesReader) Close() error {
	r.files.close()
	r.rest = nil
	return nil
}
